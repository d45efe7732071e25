"""KServe v2 beside `horace.v1`: what Triton's clients and tools speak, over the same engines.

`servicer` answers; `inputs`, `outputs` and `parameters` are between its messages and the
engine; `regions` is shared memory; `describe` says what is served; `repository` is the model
control. The messages are those of the tritonclient wheel: a copy of them would collide with
the wheel's in protobuf's pool (MLServer#1730).
"""
