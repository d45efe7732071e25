"""The RPCs of `inference.GRPCInferenceService`, over the engines that serve `horace.v1`.

Rules:
    What concerns one image is in the outputs; see `serve.kserve.outputs`.
    Everything that can be refused is refused before anything is computed.
    A caller's deadline is the earlier of gRPC's and of the parameter `timeout`.
    A request of a stream that is refused is answered with `error_message` and its id, and
    the stream goes on, in the order of its requests.
    Shared memory is for callers on this machine, whenever they use it, and what one has
    registered is no other's: a caller is its key's name, or its certificate's subject; all
    on this machine that have neither are one.

How calls are counted, observed and ended is `serve.answering`.

Source: Triton's grpc_service.proto, as the wheel of tritonclient has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc

from serve.answering import Answering, Context
from serve.catalog import Catalog, ServedModel
from serve.errors import PreconditionError, UnknownNameError
from serve.health import Health
from serve.kserve import describe
from serve.kserve.inputs import read_inputs
from serve.kserve.options import KserveOptions
from serve.kserve.outputs import Head, check_room, read_outputs, write_response
from serve.kserve.parameters import read_parameters
from serve.kserve.regions import OwnRegions, Regions
from serve.kserve.repository import check_change, load, repository_index
from serve.kserve.settings import log_settings, refuse_changes, trace_settings
from serve.lifecycle.manager import Lifecycle
from serve.operation.observer import Call
from serve.operation.tally import ModelTallies
from serve.screen import Work
from serve.security.caller import caller_of, host_of

SERVICE_NAME = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

INFER = kserve.ModelInferRequest

LOCAL = ("unix", "127.0.0.1", "::1")
"""Where callers on this machine call from."""

Message = Any
"""A message of tritonclient's, which ships no types."""


class KserveServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # untyped
    """Answers Triton's clients for a catalogue of models. Belongs to one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        answering: Answering,
        health: Health,
        options: KserveOptions,
        max_images: int,
        max_batch_images: int,
        tallies: ModelTallies,
        control: Lifecycle,
        max_message_bytes: int,
        unix_is_local: bool,
    ) -> None:
        """Serve the models of `catalog`, whose engines have owners.

        Args:
            catalog: what is offered.
            answering: how calls are answered.
            health: says whether the server is ready.
            options: what is allowed.
            max_images: of one request.
            max_batch_images: of one batch.
            tallies: what was counted of every model.
            control: loads and unloads models, where callers may.
            max_message_bytes: of a request, in the message or in shared memory.
            unix_is_local: whether who comes over a socket of this machine is on it. Behind the
                native front end streams do, whoever calls.
        """
        self._catalog = catalog
        self._answering = answering
        self._health = health
        self._options = options
        self._max_images = max_images
        self._max_batch_images = max_batch_images
        self._control = control
        self._tallies = tallies
        self._max_message_bytes = max_message_bytes
        self._local = LOCAL if unix_is_local else LOCAL[1:]
        self._regions = Regions(max_regions=options.max_regions)
        self._no_regions = OwnRegions(Regions(max_regions=0), lambda: "")

    def __repr__(self) -> str:
        return f"<KserveServicer {self._catalog!r} {self._regions!r}>"

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a front end."""
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)

    # Inference.

    async def ModelInfer(self, request: Message, context: Context) -> Message:
        """Embed one to many images."""
        answering = self._answering
        call = answering.new_call("ModelInfer", request.id, context)
        own = self._own_regions(context)
        work = self._infer(request, call, answering.deadline_s(context), own)
        return await answering.answer(call, work, context)

    def foresee_infer(self, request: Message) -> Work:
        """Say what a request would have an engine do; see `serve.screen`.

        Raises:
            HoraceError: the request is wrong, or names shared memory.
        """
        model = self._catalog.model(request.model_name, request.model_version)
        asked = read_parameters(request.parameters, dim=model.encoder.dim)
        limits = {"max_images": self._max_images, "max_bytes": self._max_message_bytes}
        images = read_inputs(request, self._no_regions, **limits).count
        return Work(model=model, images=images, priority=asked.priority, within_s=asked.timeout_s)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[Message], context: Context
    ) -> None:
        """Embed requests as they come; see the module's rules."""
        answering = self._answering
        deadline_s, late_s = answering.deadline_s(context), answering.late_s(context)
        own = self._own_regions(context)

        async def answer(request: Message, on_admitted: Callable[[], None]) -> Message:
            call = answering.new_call("ModelStreamInfer", request.id, context)
            work = self._infer_in_stream(request, call, deadline_s, own, on_admitted)

            def refuse(call: Call, _: Exception) -> Message:
                return _refusal(request, call.message)

            return await answering.answer_in_stream(call, work, refuse, late_s=late_s)

        window = self._options.stream_requests
        await answering.stream(request_iterator, context, answer, window=window)

    async def _infer_in_stream(
        self,
        request: Message,
        call: Call,
        deadline_s: float,
        own: OwnRegions,
        on_admitted: Callable[[], None],
    ) -> Message:
        """Embed one request of a stream; it has one reply, which is its last."""
        response = await self._infer(request, call, deadline_s, own, on_admitted)
        response.parameters["triton_final_response"].bool_param = True
        return kserve.ModelStreamInferResponse(infer_response=response)

    async def _infer(
        self,
        request: Message,
        call: Call,
        deadline_s: float,
        own: OwnRegions,
        on_admitted: Callable[[], None] | None = None,
    ) -> Message:
        """Embed as a request asks; with `on_admitted` it waits for room, and says when."""
        with self._catalog.lease_model(request.model_name, request.model_version) as model:
            call.model, call.version = model.name, model.version
            encoder = model.encoder
            asked = read_parameters(request.parameters, dim=encoder.dim)
            wanted = read_outputs(request, asked, own)
            inputs = read_inputs(
                request, own, max_images=self._max_images, max_bytes=self._max_message_bytes
            )
            call.images = inputs.count
            check_room(wanted, images=inputs.count, dims=asked.dims or encoder.dim)
            call.embedded = await model.engine.embed(
                inputs.images,
                count=inputs.count,
                payload_bytes=inputs.payload_bytes,
                deadline_s=min(deadline_s, call.arrived_s + asked.timeout_s),
                client=call.client,
                priority=asked.priority,
                is_unit=asked.normalize and asked.dims is None,
                on_admitted=on_admitted,
            )
        head = Head(model.name, model.version, encoder.fingerprint)
        return write_response(call.embedded, wanted, asked, head=head, request_id=request.id)

    # What is served.

    async def ServerLive(self, request: Message, context: Context) -> Message:
        """Say that the server answers."""
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Message, context: Context) -> Message:
        """Say whether every model has computed a real image, and the server does not drain."""
        return kserve.ServerReadyResponse(ready=self._health.serving)

    async def ModelReady(self, request: Message, context: Context) -> Message:
        """Say whether a model serves; not one that is not there, or that no server computes now."""
        try:
            model = self._catalog.model(request.name, request.version)
        except UnknownNameError:
            return kserve.ModelReadyResponse(ready=False)
        return kserve.ModelReadyResponse(ready=self._health.serving and model.engine.ready)

    async def ServerMetadata(self, request: Message, context: Context) -> Message:
        """Say what the server is and which extensions it has."""
        return describe.server_metadata(_own_version())

    async def ModelMetadata(self, request: Message, context: Context) -> Message:
        """Describe a model's tensors."""

        async def work() -> Message:
            model = self._catalog.model(request.name, request.version)
            return describe.model_metadata(
                model, sorted(self._catalog.versions[model.name], key=int)
            )

        return await self._answer("ModelMetadata", work(), context)

    async def ModelConfig(self, request: Message, context: Context) -> Message:
        """Describe a model as Triton's configuration does."""

        async def work() -> Message:
            config = describe.model_config(
                self._catalog.model(request.name, request.version),
                max_images=self._max_images,
                max_batch_images=self._max_batch_images,
            )
            return kserve.ModelConfigResponse(config=config)

        return await self._answer("ModelConfig", work(), context)

    async def ModelStatistics(self, request: Message, context: Context) -> Message:
        """Give what was counted of one model, or of all."""

        async def work() -> Message:
            models = self._models(request.name, request.version)
            pairs = [(model.name, model.version) for model in models]
            with self._tallies.reading(*pairs):
                counted = [self._tallies.find(*pair) for pair in pairs]
                return kserve.ModelStatisticsResponse(
                    model_stats=map(describe.model_statistics, models, counted)
                )

        return await self._answer("ModelStatistics", work(), context)

    # The repository.

    async def RepositoryIndex(self, request: Message, context: Context) -> Message:
        """List the models that the server knows."""

        async def work() -> Message:
            return repository_index(self._control.index(), ready_only=request.ready)

        return await self._answer("RepositoryIndex", work(), context)

    async def RepositoryModelLoad(self, request: Message, context: Context) -> Message:
        """Load a model, or load it again."""

        async def work() -> Message:
            check_change(request.repository_name, request.parameters)
            await load(self._control, request.model_name)
            return kserve.RepositoryModelLoadResponse()

        return await self._answer("RepositoryModelLoad", work(), context)

    async def RepositoryModelUnload(self, request: Message, context: Context) -> Message:
        """Serve a model no more."""

        async def work() -> Message:
            check_change(request.repository_name, request.parameters)
            await self._control.unload(request.model_name)
            return kserve.RepositoryModelUnloadResponse()

        return await self._answer("RepositoryModelUnload", work(), context)

    # Shared memory.

    async def SystemSharedMemoryStatus(self, request: Message, context: Context) -> Message:
        """List one region, or all."""

        async def work() -> Message:
            response = kserve.SystemSharedMemoryStatusResponse()
            if self._is_local(context):
                regions = self._regions.status(self._owner(context), request.name)
            else:
                regions = []
            for region in regions:
                entry = response.regions[region.name]
                entry.name, entry.key = region.name, region.key
                entry.offset, entry.byte_size = region.offset, region.byte_size
            return response

        return await self._answer("SystemSharedMemoryStatus", work(), context)

    async def SystemSharedMemoryRegister(self, request: Message, context: Context) -> Message:
        """Register a region, for a caller on this machine."""

        async def work() -> Message:
            owner = self._owner(context)
            self._regions.register(
                owner, request.name, request.key, request.offset, request.byte_size
            )
            return kserve.SystemSharedMemoryRegisterResponse()

        return await self._answer("SystemSharedMemoryRegister", work(), context)

    async def SystemSharedMemoryUnregister(self, request: Message, context: Context) -> Message:
        """Forget one of the caller's regions, or all; who may have none has none to forget."""
        if self._is_local(context):
            self._regions.unregister(self._owner(context), request.name)
        return kserve.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Message, context: Context) -> Message:
        """List no region."""
        return kserve.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Message, context: Context) -> Message:
        """Refuse: this server has no memory of a GPU to share."""

        async def work() -> Message:
            raise PreconditionError(
                "CUDA shared memory",
                expected="system shared memory, or tensors in the request",
                found="a CUDA region",
            )

        return await self._answer("CudaSharedMemoryRegister", work(), context)

    async def CudaSharedMemoryUnregister(self, request: Message, context: Context) -> Message:
        """Do nothing: perf_analyzer unregisters what it never registered."""
        return kserve.CudaSharedMemoryUnregisterResponse()

    # Settings.

    async def TraceSetting(self, request: Message, context: Context) -> Message:
        """Tell Triton's trace settings."""

        async def work() -> Message:
            refuse_changes("trace", request.settings)
            return trace_settings()

        return await self._answer("TraceSetting", work(), context)

    async def LogSettings(self, request: Message, context: Context) -> Message:
        """Tell Triton's log settings."""

        async def work() -> Message:
            refuse_changes("log", request.settings)
            return log_settings()

        return await self._answer("LogSettings", work(), context)

    # What several of these need.

    async def _answer(
        self, method: str, work: Coroutine[Any, Any, Message], context: Context
    ) -> Message:
        """Answer a call that is about no image."""
        return await self._answering.answer(
            self._answering.new_call(method, "", context), work, context
        )

    def _models(self, name: str, version: str) -> list[ServedModel]:
        """Give one version of a model, or all of one, or of every model."""
        if version:
            return [self._catalog.model(name, version)]
        names = [self._catalog.model(name).name] if name else list(self._catalog.versions)
        return [model for name in names for model in self._catalog.versions[name].values()]

    def _is_local(self, context: Context) -> bool:
        """Whether a caller may use shared memory."""
        return self._options.shared_memory != "off" and host_of(context.peer()) in self._local

    def _owner(self, context: Context) -> str:
        """Name whose regions a caller's are.

        Raises:
            PreconditionError: shared memory is off, or the caller is elsewhere.
        """
        if not self._is_local(context):
            off = "a server that has it switched off"
            raise PreconditionError(
                "shared memory",
                expected="a caller on the server's machine",
                found=off if self._options.shared_memory == "off" else "one elsewhere",
                mend="send tensors in the request",
            )
        client = caller_of(context)
        return "" if client in LOCAL else client

    def _own_regions(self, context: Context) -> OwnRegions:
        """Give the regions that the requests of a caller may name."""
        return OwnRegions(self._regions, partial(self._owner, context))


def _refusal(request: Message, message: str) -> Message:
    """Say in a stream why a request failed, and which."""
    response = kserve.ModelInferResponse(
        model_name=request.model_name, model_version=request.model_version, id=request.id
    )
    response.parameters["triton_final_response"].bool_param = True
    return kserve.ModelStreamInferResponse(error_message=message, infer_response=response)


def _own_version() -> str:
    """Give Horace's version, where it is installed."""
    try:
        return version("horace")
    except PackageNotFoundError:
        return "unknown"
