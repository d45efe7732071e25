from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FP32: _ClassVar[DType]
    FP16: _ClassVar[DType]
    INT8: _ClassVar[DType]

class ItemCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OK: _ClassVar[ItemCode]
    EMPTY: _ClassVar[ItemCode]
    UNREADABLE: _ClassVar[ItemCode]
    TOO_MANY_BYTES: _ClassVar[ItemCode]
    TOO_MANY_PIXELS: _ClassVar[ItemCode]
    UNSUPPORTED_FORMAT: _ClassVar[ItemCode]
    CORRUPT: _ClassVar[ItemCode]
    WRONG_SHAPE: _ClassVar[ItemCode]
    NOT_FOUND: _ClassVar[ItemCode]
    WRONG_QUERY: _ClassVar[ItemCode]
    NOT_FINITE: _ClassVar[ItemCode]
    OUT_OF_RANGE: _ClassVar[ItemCode]
DTYPE_UNSPECIFIED: DType
FP32: DType
FP16: DType
INT8: DType
OK: ItemCode
EMPTY: ItemCode
UNREADABLE: ItemCode
TOO_MANY_BYTES: ItemCode
TOO_MANY_PIXELS: ItemCode
UNSUPPORTED_FORMAT: ItemCode
CORRUPT: ItemCode
WRONG_SHAPE: ItemCode
NOT_FOUND: ItemCode
WRONG_QUERY: ItemCode
NOT_FINITE: ItemCode
OUT_OF_RANGE: ItemCode

class ItemStatus(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ItemCode
    message: str
    def __init__(self, code: _Optional[_Union[ItemCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("pixels", "height", "width", "channels")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    pixels: bytes
    height: int
    width: int
    channels: int
    def __init__(self, pixels: _Optional[bytes] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawImage
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ...) -> None: ...

class Vectors(_message.Message):
    __slots__ = ("data", "dtype", "rows", "dim", "scales")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    dtype: DType
    rows: int
    dim: int
    scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, data: _Optional[bytes] = ..., dtype: _Optional[_Union[DType, str]] = ..., rows: _Optional[int] = ..., dim: _Optional[int] = ..., scales: _Optional[_Iterable[float]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "inference_ms", "total_ms", "search_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    inference_ms: float
    total_ms: float
    search_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., inference_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., search_ms: _Optional[float] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("model", "images", "dims", "skip_normalize", "dtype", "request_id", "priority", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    SKIP_NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    dims: int
    skip_normalize: bool
    dtype: DType
    request_id: str
    priority: int
    version: str
    def __init__(self, model: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., dims: _Optional[int] = ..., skip_normalize: _Optional[bool] = ..., dtype: _Optional[_Union[DType, str]] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class RequestError(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("vectors", "statuses", "model", "fingerprint", "timings", "request_id", "error", "version")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    vectors: Vectors
    statuses: _containers.RepeatedCompositeFieldContainer[ItemStatus]
    model: str
    fingerprint: str
    timings: Timings
    request_id: str
    error: RequestError
    version: str
    def __init__(self, vectors: _Optional[_Union[Vectors, _Mapping]] = ..., statuses: _Optional[_Iterable[_Union[ItemStatus, _Mapping]]] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...

class VectorQueries(_message.Message):
    __slots__ = ("vectors", "fingerprint")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    vectors: Vectors
    fingerprint: str
    def __init__(self, vectors: _Optional[_Union[Vectors, _Mapping]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ImageQueries(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ...) -> None: ...

class IdQueries(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("image", "vector", "id")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    image: Image
    vector: VectorQueries
    id: int
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., vector: _Optional[_Union[VectorQueries, _Mapping]] = ..., id: _Optional[int] = ...) -> None: ...

class Combination(_message.Message):
    __slots__ = ("positives", "negatives", "negative_weight")
    POSITIVES_FIELD_NUMBER: _ClassVar[int]
    NEGATIVES_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    positives: _containers.RepeatedCompositeFieldContainer[Example]
    negatives: _containers.RepeatedCompositeFieldContainer[Example]
    negative_weight: float
    def __init__(self, positives: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., negatives: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., negative_weight: _Optional[float] = ...) -> None: ...

class Combined(_message.Message):
    __slots__ = ("queries",)
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[Combination]
    def __init__(self, queries: _Optional[_Iterable[_Union[Combination, _Mapping]]] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("collection", "images", "vectors", "ids", "combined", "k", "exact", "include_vectors", "request_id", "priority", "filter", "effort", "min_score", "diversity", "include_metadata")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    COMBINED_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    EFFORT_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_METADATA_FIELD_NUMBER: _ClassVar[int]
    collection: str
    images: ImageQueries
    vectors: VectorQueries
    ids: IdQueries
    combined: Combined
    k: int
    exact: bool
    include_vectors: bool
    request_id: str
    priority: int
    filter: str
    effort: int
    min_score: float
    diversity: float
    include_metadata: bool
    def __init__(self, collection: _Optional[str] = ..., images: _Optional[_Union[ImageQueries, _Mapping]] = ..., vectors: _Optional[_Union[VectorQueries, _Mapping]] = ..., ids: _Optional[_Union[IdQueries, _Mapping]] = ..., combined: _Optional[_Union[Combined, _Mapping]] = ..., k: _Optional[int] = ..., exact: _Optional[bool] = ..., include_vectors: _Optional[bool] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ..., filter: _Optional[str] = ..., effort: _Optional[int] = ..., min_score: _Optional[float] = ..., diversity: _Optional[float] = ..., include_metadata: _Optional[bool] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("id", "score", "key", "label", "source", "metadata")
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    id: int
    score: float
    key: str
    label: str
    source: str
    metadata: str
    def __init__(self, id: _Optional[int] = ..., score: _Optional[float] = ..., key: _Optional[str] = ..., label: _Optional[str] = ..., source: _Optional[str] = ..., metadata: _Optional[str] = ...) -> None: ...

class Hits(_message.Message):
    __slots__ = ("hits", "status", "vectors")
    HITS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    status: ItemStatus
    vectors: Vectors
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., status: _Optional[_Union[ItemStatus, _Mapping]] = ..., vectors: _Optional[_Union[Vectors, _Mapping]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("results", "collection", "fingerprint", "timings", "request_id", "version")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Hits]
    collection: str
    fingerprint: str
    timings: Timings
    request_id: str
    version: str
    def __init__(self, results: _Optional[_Iterable[_Union[Hits, _Mapping]]] = ..., collection: _Optional[str] = ..., fingerprint: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "fingerprint", "dim", "preprocessing_json", "is_default", "max_images_per_request", "max_request_bytes", "version", "versions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_JSON_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    dim: int
    preprocessing_json: str
    is_default: bool
    max_images_per_request: int
    max_request_bytes: int
    version: str
    versions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dim: _Optional[int] = ..., preprocessing_json: _Optional[str] = ..., is_default: _Optional[bool] = ..., max_images_per_request: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., version: _Optional[str] = ..., versions: _Optional[_Iterable[str]] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class ListCollectionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Collection(_message.Message):
    __slots__ = ("name", "fingerprint", "dim", "count", "metric", "index", "model", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    dim: int
    count: int
    metric: str
    index: str
    model: str
    version: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dim: _Optional[int] = ..., count: _Optional[int] = ..., metric: _Optional[str] = ..., index: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ListCollectionsResponse(_message.Message):
    __slots__ = ("collections",)
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[Collection]
    def __init__(self, collections: _Optional[_Iterable[_Union[Collection, _Mapping]]] = ...) -> None: ...
