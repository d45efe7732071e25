"""HTTP and JSON beside gRPC: the same services, catalogue and engines behind another door.

Rules:
    A request becomes the message of `protos/horace.proto` and is answered by the servicer of
    `serve.services`; what it may ask, what it costs and how it fails is decided there.
    Who may call is decided from the headers, before a byte of the body is read; a body is
    bounded by itself and together with all others, and is never written to a disk.
    A caller that hangs up is a caller that cancels.
"""
