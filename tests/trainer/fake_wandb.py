"""A W&B server on loopback: just enough of its HTTP interface for one run to be opened, resumed, fed and closed."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "x" * 40


class FakeWandb:
    """Keeps the history rows that arrive, by run id and line number, as the real server does."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    raw = gzip.decompress(raw)
                body = json.dumps(outer.answer(self.path, raw)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST

            def log_message(self, *args: object) -> None:
                """Keep the tests' output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def steps(self, run_id: str) -> list[int]:
        """The steps of the run's history, in the order of its lines."""
        return [row["_step"] for _, row in sorted(self.history[run_id].items())]

    def stop(self) -> None:
        """From here on, connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, raw: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            sent = json.loads(raw).get("files", {}).get("wandb-history.jsonl")
            rows = self.history.setdefault(path.split("/")[-2], {})
            if sent:
                rows.update({sent["offset"] + i: json.loads(line) for i, line in enumerate(sent["content"])})
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(raw)
        query, variables = request["query"], request.get("variables") or {}
        if "RunResumeStatus" in query:
            return {"data": {"model": self._resume_status(variables["name"])}}
        if "upsertBucket" in query:
            project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}}
            bucket = {"id": "Yg==", "name": variables["name"], "displayName": "run", "config": "{}", "sweepName": None, "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}}
        if query.lstrip().startswith("mutation"):  # tables are uploaded as artifacts, which this server refuses
            return {"errors": [{"message": "not supported"}]}
        return {"data": {}}

    def _resume_status(self, run_id: str) -> dict[str, Any]:
        rows = [row for _, row in sorted(self.history.get(run_id, {}).items())]
        model: dict[str, Any] = {"id": "bQ==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}, "bucket": None}
        if rows:
            tail = json.dumps([json.dumps(rows[-1])])
            counts = {"historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0}
            texts = {"historyTail": tail, "eventsTail": "[]", "config": "{}", "summaryMetrics": json.dumps(rows[-1])}
            model["bucket"] = {"id": "Yg==", "name": run_id, "tags": [], "wandbConfig": '{"t": 1}', **counts, **texts}
        return model
