"""The gRPC server, its services and its client."""

import os
import sys
from itertools import pairwise

COMMANDS = ("serve", "serve.client")

# gRPC reads this once, when it is loaded. Without it whoever fails a handshake writes a line of
# gRPC's own into the server's log, and a client one beside its error.
if any(flag == "-m" and module in COMMANDS for flag, module in pairwise(sys.orig_argv)):
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
