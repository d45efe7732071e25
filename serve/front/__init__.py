"""The front ends: where gRPC calls come in and replies leave.

A front takes the servicers that grpcio's generated code registers, whichever it is, so a
service is written once. `make_front` gives the one that serves what is asked.
"""

from __future__ import annotations

from serve.front.base import Front, FrontKind
from serve.front.make import make_front

__all__ = ["Front", "FrontKind", "make_front"]
