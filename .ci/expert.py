"""An expert for the check: an OpenAI-compatible server whose every answer is one idea and one action. Prints its URL."""
import http.server
import json

ANSWER = """- Scale the features: Standardise every column before the model is fitted.

Reflection: Nothing has been run so far.
Research Plan and Status: 1. **Run train.py.**
Fact Check: Nothing is confirmed yet.
Thought: I run the script as it is.
Action: Execute Script
Action Input: {"script_name": "train.py"}"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": ANSWER}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    print(f"http://127.0.0.1:{server.server_port}/v1#name", flush=True)
    server.serve_forever()
