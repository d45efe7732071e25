"""Several processes on one port: where each stands among them, and who minds them.

The supervisor serves nothing itself. Each worker is a whole server of its own, with the
models, the threads and the limits of one; the kernel gives it its share of the connections.
"""
