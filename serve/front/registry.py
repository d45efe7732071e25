"""Collects handlers as `grpc.aio.Server` does, for a front end that serves some itself.

Generated code registers a service twice: once with a generic handler, which is asked by
path, and from grpcio-tools 1.64 on with one handler a method. Methods that are known by path
and answer one message with one may be taken; the rest stays with grpcio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Registry(grpc.aio.Server):
    """What `add_XServicer_to_server` takes. It listens nowhere: its front end does."""

    def __init__(self, behind: grpc.aio.Server) -> None:
        """Collect; what cannot be taken goes to `behind`."""
        self._behind = behind
        self._unary: dict[str, Handler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._services: set[str] = set()

    def __repr__(self) -> str:
        return f"<Registry unary={len(self._unary)} behind={len(self._generic)}>"

    @property
    def unary(self) -> Mapping[str, Handler]:
        """Methods that answer one message with one, by path."""
        return self._unary

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]
    ) -> None:
        """Note services; those that are registered by method, too, are not asked by path."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        """Take the unary methods of a service and leave its streams to grpcio."""
        self._services.add(service_name)
        streams: dict[str, Handler] = {}
        for name, handler in method_handlers.items():
            if handler.request_streaming or handler.response_streaming:
                streams[name] = handler
            else:
                self._unary[f"/{service_name}/{name}"] = handler
        self._behind.add_registered_method_handlers(service_name, streams)

    def hand_over(self) -> None:
        """Give grpcio the services that are known by path alone."""
        for handler in self._generic:
            service: Any = handler  # a grpc.ServiceRpcHandler, which the stubs do not know
            name = getattr(service, "service_name", lambda: None)()
            if name not in self._services:
                self._behind.add_generic_rpc_handlers((handler,))

    # What the front end does instead.

    def add_insecure_port(self, address: str) -> NoReturn:
        """Nobody calls this."""
        raise AssertionError("the front end listens")

    def add_secure_port(self, address: str, server_credentials: object) -> NoReturn:
        """Nobody calls this."""
        raise AssertionError("the front end listens")

    async def start(self) -> NoReturn:
        """Nobody calls this."""
        raise AssertionError("the front end starts")

    async def stop(self, grace: float | None) -> NoReturn:
        """Nobody calls this."""
        raise AssertionError("the front end stops")

    async def wait_for_termination(self, timeout: float | None = None) -> NoReturn:
        """Nobody calls this."""
        raise AssertionError("the front end stops")
