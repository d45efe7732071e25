"""The options of `python -m serve`: what may be asked for, and what makes no sense."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes, UseAppendAction

from models.bundle import SHIPPED_BUNDLE
from models.errors import UsageError
from models.preprocess import ImageLimits
from serve.front import FrontKind
from serve.http.options import HttpOptions
from serve.kserve.options import KserveOptions
from serve.lifecycle.options import ModelOptions, NamedPath, read_model_options, read_named_path
from serve.operation.options import LogOptions, MetricsOptions, TracingOptions
from serve.security.options import CallerLimits, KeyOptions
from serve.security.tls import TlsOptions
from serve.services import RequestLimits
from serve.watchdog import WatchdogOptions

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve image encoders, and search in collections of their vectors, over gRPC."""

    bundle: UseAppendAction[tuple[str, ...]] = ()
    """[NAME=]DIR, [NAME=]horace://HOST:PORT/MODEL or, for one or more Tritons,
    [NAME=]triton://HOST:PORT[,HOST:PORT...]/MODEL; the encoder that ships where none is given.
    DIR is a bundle, or has bundles in 1/, 2/, ...: versions, of which the newest is
    served. Give it several times for several models; the first is the default. Options follow
    a comma: precision=fp32|int8|fp16, provider=cpu|cuda|tensorrt, device=N (the GPU),
    instances=N (on a GPU 2, of triton:// 2 for each endpoint), threads=N, keep=N (versions served
    at a time; 1)."""

    collection: UseAppendAction[tuple[str, ...]] = ()
    """[NAME=]DIR of a collection that one of the bundles made; several are possible."""

    repository: str | None = None
    """A directory whose subdirectories are models, each a bundle or with versions."""

    watch_s: float = 0.0
    """How often to look whether bundles, collections and the repository have changed, and to
    load what has; 0: only on SIGHUP."""

    model_control: bool = False
    """Whether callers may load and unload models."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or [::] for every interface."""

    port: int = 50051
    """Port to listen on; 0 takes a free one, which the line on stdout names."""

    frontend: FrontKind = "auto"
    """What reads gRPC: grpcio, which can do everything, or native, which is fast, has no TLS and
    takes messages of any size in; auto takes native where only this machine can call."""

    kserve: KserveOptions = field(default_factory=KserveOptions)
    """KServe v2."""

    workers: int = 1
    """Processes that share the port and the CPU budget, each with its own copy of what is
    served. Limits of queues, calls and callers are of each. A connection stays with the one
    that took it, so a caller has several of them from several connections only."""

    max_batch_images: int = 32
    """The largest batch that the encoder is given."""

    max_delay_ms: float = 0.0
    """How long an idle encoder may wait for a fuller batch, from the oldest arrival."""

    instances: int | None = None
    """Batches of one model that run at once, each on all of the model's threads. Where not
    given: on a GPU or elsewhere one; on CPUs one on all threads while there are fewer images
    than threads, and else one on each thread, for which the weights are in memory twice."""

    max_queue_images: int = 4096
    """Images of one model that may wait or run; a request beyond them is refused."""

    max_queue_mib: int = 512
    """The same in MiB of payload and pixels."""

    max_in_flight_mib: int = 256
    """Messages of all calls under way, in MiB; a call beyond them is refused unparsed."""

    max_images_per_request: int = 1024
    """Images of an Embed, queries of a Search."""

    max_neighbours: int = 1000
    """The largest k of a Search."""

    max_message_mib: int = 64
    """The largest request, in MiB."""

    max_image_bytes: int = ImageLimits.max_image_bytes
    """The largest encoded image; a larger one is refused by itself."""

    max_image_pixels: int = 32 << 20
    """The largest image in pixels, looked at before it is decoded. A transparent one takes up
    to 14 bytes a pixel while it is decoded."""

    stream_requests: int = 8
    """Requests of one stream that are under way at once."""

    max_calls: int = 1024
    """Calls and streams that are open at once; one beyond them is refused unread. On grpcio
    some that wait to be read are ended from a quarter of this on (64 at least), and all from
    half. Fewer help where many small requests have deadlines."""

    cpu_budget: int | None = None
    """CPUs for decoding and inference; those that the process may use where not given. The
    models that there are when one is loaded, the repository's included, share them evenly,
    each model's among its instances; no model has less than one. Nothing is taken from what
    is served: a model that comes later, or a version that is kept, has its threads beside."""

    drain_s: float = 30.0
    """How long requests under way may take after SIGTERM."""

    tls: TlsOptions = field(default_factory=TlsOptions)
    """TLS."""

    keys: KeyOptions = field(default_factory=KeyOptions)
    """API keys."""

    limits: CallerLimits = field(default_factory=CallerLimits)
    """What each caller may ask for."""

    metrics: MetricsOptions = field(default_factory=MetricsOptions)

    watchdog: WatchdogOptions = field(default_factory=WatchdogOptions)
    """Threads that hang."""

    tracing: TracingOptions = field(default_factory=TracingOptions)

    log: OmitArgPrefixes[LogOptions] = field(default_factory=LogOptions)

    http: HttpOptions = field(default_factory=HttpOptions)
    """HTTP and JSON beside gRPC; off unless it has a port."""

    bundles: tuple[ModelOptions, ...] = field(init=False, repr=False, compare=False)
    collections: tuple[NamedPath, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every value and read the names.

        Raises:
            UsageError: a value makes no sense.
        """
        if not 0 <= self.port <= 65535:
            raise UsageError("--port", expected="0 to 65535", found=str(self.port))
        for name in POSITIVE:
            value, most = getattr(self, name), MOST.get(name, MOST_OF_ANY)
            if value is not None and not 1 <= value <= most:
                option = "--" + name.replace("_", "-")
                expected = "at least 1" if value < 1 else f"at most {most}"
                raise UsageError(option, expected=expected, found=str(value))
        for name, most in (("max_delay_ms", 1000), ("drain_s", 3600), ("watch_s", 3600)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                option = "--" + name.replace("_", "-")
                raise UsageError(option, expected=f"0 to {most}", found=str(value))
        if self.model_control and self.workers > 1:
            raise UsageError(
                "--model-control",
                expected="one worker: a call reaches one alone",
                found=f"--workers {self.workers}",
                mend="let them watch the disk with --watch-s, or send SIGHUP",
            )
        most = 65536 - self.workers
        if self.metrics.port and self.metrics.port > most:
            expected = f"0 to {most}: worker i takes this number + i"
            raise UsageError("--metrics.port", expected=expected, found=str(self.metrics.port))
        bundles = tuple(map(read_model_options, self.bundle))
        if not bundles and self.repository is None:
            bundles = (ModelOptions(name=None, path=str(SHIPPED_BUNDLE)),)
        object.__setattr__(self, "bundles", bundles)
        object.__setattr__(self, "collections", tuple(map(read_named_path, self.collection)))

    @property
    def image_limits(self) -> ImageLimits:
        """What one image may cost."""
        return ImageLimits(max_image_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)

    @property
    def request_limits(self) -> RequestLimits:
        """What one request may ask for."""
        return RequestLimits(
            max_images=self.max_images_per_request,
            max_message_bytes=self.max_message_mib * MIB,
            max_neighbours=self.max_neighbours,
            stream_requests=self.stream_requests,
        )


POSITIVE = (
    "workers",
    "max_batch_images",
    "instances",
    "max_queue_images",
    "max_queue_mib",
    "max_in_flight_mib",
    "max_images_per_request",
    "max_neighbours",
    "max_message_mib",
    "max_image_bytes",
    "max_image_pixels",
    "stream_requests",
    "max_calls",
    "cpu_budget",
)
"""Options that count something."""

MOST_OF_ANY = 1_000_000_000
"""What gRPC and protobuf keep in 31 bits, with some beside."""

MOST = {"max_message_mib": 2047, "cpu_budget": 4096, "workers": 4096, "instances": 4096}
"""A message of protobuf has less than 2 GiB; each CPU, worker and instance has threads."""
