"""What a collection in Milvus says of itself: its schema, its index, and its properties.

Properties play the manifest: name, fingerprint, encoder, preprocessing, metric, sources, and
the columns of its rows with their types.

Rules:
    A collection without these properties is somebody else's, and refused.
    Columns beyond `ROW_SCHEMA` are dynamic fields; a value that is not there is null.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from index.errors import CollectionError
from index.milvus.connection import MilvusAddress
from index.storage.rows import ROW_SCHEMA
from models.bundle import Json

if TYPE_CHECKING:
    from pymilvus import CollectionSchema, MilvusClient
    from pymilvus.milvus_client.index import IndexParams

VECTOR = "vector"
SCHEMA_VERSION = 1
MAX_TEXT_BYTES = 65535
"""Of a key, label or source: the most that a VARCHAR takes."""

METRICS = {"cosine": "COSINE", "euclidean": "L2"}
INDEXES: dict[str, dict[str, Any]] = {
    "flat": {"index_type": "FLAT", "params": {}},
    "hnsw": {"index_type": "HNSW", "params": {"M": 32, "efConstruction": 80}},
}
"""As the kinds on disk are built: `HNSW32`, and every vector."""

_PREFIX = "horace."


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a collection holds, as far as its manifest would say.

    Attributes:
        name: a word for people.
        fingerprint: of the encoder that made every vector.
        dim: length of a vector.
        metric: `cosine` or `euclidean`.
        encoder: URI or path of that encoder.
        preprocessing: of that encoder, as JSON.
        sources: URI and number of images of each source at its last build.
        columns: names and types of the rows' columns.
        index: `flat` or `hnsw`, as the collection was made.
    """

    name: str
    fingerprint: str
    dim: int
    metric: str = "cosine"
    encoder: str = ""
    preprocessing: Mapping[str, Json] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    columns: pa.Schema = ROW_SCHEMA
    index: str = "hnsw"

    def with_columns(self, schema: pa.Schema) -> Description:
        """Add the columns that are new.

        Raises:
            CollectionError: a column is there with another type.
        """
        new = []
        for one in schema:
            known = self.columns.field(one.name) if one.name in self.columns.names else None
            if known is None:
                new.append(one)
            elif known.type != one.type:
                raise CollectionError(
                    f"column {one.name}",
                    expected=f"{known.type}, as in collection {self.name}",
                    found=str(one.type),
                )
        return replace(self, columns=pa.schema([*self.columns, *new]))


def to_properties(description: Description) -> dict[str, str]:
    """Lay a description out as properties, which are texts."""
    values = {
        "schema_version": str(SCHEMA_VERSION),
        "name": description.name,
        "fingerprint": description.fingerprint,
        "metric": description.metric,
        "encoder": description.encoder,
        "preprocessing": json.dumps(dict(description.preprocessing)),
        "sources": json.dumps(dict(description.sources)),
        "columns": base64.b64encode(description.columns.serialize().to_pybytes()).decode(),
        "index": description.index,
    }
    return {_PREFIX + name: value for name, value in values.items()}


def read_description(address: MilvusAddress, described: Mapping[str, Any]) -> Description:
    """Read what Milvus says of a collection.

    Raises:
        CollectionError: Horace did not make it, or another version did.
    """
    properties = cast(Mapping[str, str], described.get("properties") or {})
    try:
        values = {
            name.removeprefix(_PREFIX): value
            for name, value in properties.items()
            if name.startswith(_PREFIX)
        }
        if values["schema_version"] != str(SCHEMA_VERSION):
            raise ValueError(f"schema version {values['schema_version']}")
        (vector,) = (one for one in described["fields"] if one["name"] == VECTOR)
        columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["columns"])))
        return Description(
            name=values["name"],
            fingerprint=values["fingerprint"],
            dim=int(vector["params"]["dim"]),
            metric=values["metric"],
            encoder=values["encoder"],
            preprocessing=json.loads(values["preprocessing"]),
            sources=json.loads(values["sources"]),
            columns=columns,
            index=values["index"],
        )
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise CollectionError(
            str(address),
            expected=f"a collection that Horace made, of schema {SCHEMA_VERSION}",
            found=f"one without a usable property: {error}",
            mend="make one with `python -m index.build --store milvus:URI`",
        ) from error


def make_schema(client: MilvusClient, dim: int) -> CollectionSchema:
    """Give the fields of a collection."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("key", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field("label", DataType.VARCHAR, max_length=MAX_TEXT_BYTES, nullable=True)
    schema.add_field("source", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
    return cast("CollectionSchema", schema)


def make_index(client: MilvusClient, description: Description) -> IndexParams:
    """Give the index over its vectors."""
    parameters = client.prepare_index_params()
    metric = METRICS[description.metric]
    parameters.add_index(VECTOR, metric_type=metric, **INDEXES[description.index])
    return cast("IndexParams", parameters)
