from contextlib import closing

import numpy as np
import pytest

from index.build import BuildOptions, build
from index.evaluation import evaluate_recall, evaluate_retrieval, evaluate_space
from index.evaluation.evaluate_recall import RecallOptions
from index.evaluation.evaluate_retrieval import RetrievalOptions
from index.evaluation.evaluate_space import SpaceOptions
from index.interface import open_collection


@pytest.fixture(scope="module")
def stored(tmp_path_factory, milvus, bundle, train_folder):
    """The images of `built` in a Milvus; its address."""
    options = BuildOptions(
        images=str(train_folder), encoder=str(bundle.path),
        out=tmp_path_factory.mktemp("parts") / "colours", store=f"milvus:{milvus}", index="hnsw",
    )  # fmt: skip
    return build(options).collection


def test_a_milvus_is_evaluated_as_a_directory_is(stored, built):
    """The same figures of the same vectors; what a Milvus cannot be asked for is left out."""
    address = str(stored)
    rankings = [
        evaluate_retrieval.evaluate(RetrievalOptions(collection=where))
        for where in (address, str(built))
    ]
    assert rankings[0].measures == rankings[1].measures
    assert rankings[0].duplicates == rankings[1].duplicates
    spaces = [
        evaluate_space.evaluate(SpaceOptions(collection=where, other=str(built)))
        for where in (address, str(built))
    ]
    assert spaces[0].rankme == pytest.approx(spaces[1].rankme)
    assert spaces[0].drift.neighbour_overlap == 1.0
    report = evaluate_recall.evaluate(RecallOptions(collection=address, n_queries=20))
    assert [one.name for one in report.conditions] == [
        "all images", "50% by a filter", "10% by a filter", "1% by a filter"
    ]  # fmt: skip
    assert report.conditions[0].by_k[10].mean > 0.9
    assert report.bytes_by_file == {}
    with closing(open_collection(address)) as collection:
        ids = np.sort(collection.ids)
    assert report.conditions[1].filter == f"id <= {ids[29]}"
