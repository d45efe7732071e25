from __future__ import annotations

import pytest

from models.errors import UsageError
from models.providers import Placement
from serve.lifecycle.options import ModelOptions, read_model_options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("dir", ModelOptions(name=None, path="dir")),
        ("m=a,b/c", ModelOptions(name="m", path="a,b/c")),
        (
            "m=dir,precision=int8,instances=2,provider=cuda,device=1,threads=3,keep=2",
            ModelOptions(
                name="m", path="dir", precision="int8", instances=2, provider="cuda",
                device=1, threads=3, keep=2,
            ),
        ),
        (
            "m=triton://one:8001,two:8001,three:8001/m",
            ModelOptions(name="m", path="triton://one:8001,two:8001,three:8001/m", instances=6),
        ),
        (
            "m=triton://one:8001,two:8001/m,instances=4",
            ModelOptions(name="m", path="triton://one:8001,two:8001/m", instances=4),
        ),
    ],
)  # fmt: skip
def test_options_follow_the_path(text, options):
    """A comma alone belongs to the path; what is not said is left to the server."""
    assert read_model_options(text) == options


def test_where_it_computes():
    """Provider and device are one placement; a scheme makes a model remote."""
    options = read_model_options("dir,provider=cuda,device=1")
    assert options.placement == Placement(provider="cuda", device=1)
    assert not options.is_remote
    assert read_model_options("horace://there:1/m").is_remote


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"expected \[NAME=\]PATH, found ''"),
        ("d,precision=fp64", "precision: expected fp32 or int8 or fp16, found 'fp64'"),
        ("d,provider=gpu", "provider: expected cpu or cuda or tensorrt, found 'gpu'"),
        ("d,instances=0", "instances: expected a number from 1, found '0'"),
        ("d,threads=many", "threads: expected a number from 1, found 'many'"),
        ("d,device=-1", "device: expected a number from 0, found '-1'"),
        ("d,device=1", "device: expected provider=cuda or tensorrt beside it, found none"),
        ("d,provider=cpu,device=0", "cuda or tensorrt beside it, found cpu"),
        ("d,treads=2", "expected precision, provider, device, instances, threads or keep, found"),
        ("d,keep=2,keep=3", "expected one keep, found two"),
        ("horace://h:1/m,precision=int8", "expected no option but instances: the server there"),
    ],
)
def test_what_makes_no_sense_is_one_line(text, line):
    """The line has the whole text, what is wrong with it, and what would be right."""
    with pytest.raises(UsageError, match=line):
        read_model_options(text)
