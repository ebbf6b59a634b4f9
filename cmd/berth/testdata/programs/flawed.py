"""A server that is good on its first start, and on the next what the file FLAW says by then: flawed.py PORT FLAW.

dies: it ends right after listen. deaf: it listens and never accepts. slow: it needs 2 s before it binds."""
import http.server
import os
import socket
import sys
import time

port, flaw = int(sys.argv[1]), ""
if os.path.exists(sys.argv[2]):
    with open(sys.argv[2]) as f:
        flaw = f.read().strip()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self):
        body = b"hello %d\n" % os.getpid()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if flaw == "dies":
    s = socket.create_server(("0.0.0.0", port))
    print("the configuration is wrong", flush=True)
    sys.exit(7)
if flaw == "deaf":
    s = socket.create_server(("0.0.0.0", port))
    print("waiting for the database", flush=True)
    time.sleep(1000)
if flaw == "slow":
    time.sleep(2)
http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
