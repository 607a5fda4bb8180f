"""A small server that answers as vLLM does, with transformers and PEFT behind it; no vLLM is run in these tests."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class FakeVllm(ThreadingHTTPServer):
    """`lora` off: as without --enable-lora; `processed`: as with --logprobs-mode processed_logprobs."""

    daemon_threads = True

    def __init__(self, base, *, lora=True, processed=False, max_model_len=64):
        from transformers import AutoModelForCausalLM

        super().__init__(("127.0.0.1", 0), Answer)
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.base, self.lora, self.processed, self.max_model_len = str(base), lora, processed, max_model_len
        self.adapters, self.asked, self.lock = [], [], threading.Lock()
        self.overloaded = 0  # so many completions are answered 503
        self.held = threading.Event()  # completions wait for it
        self.held.set()
        self.well = True
        self.wrong = 0  # added to every id, as another vocabulary would

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def write(self, body):
        """The ids, their log-probabilities, and why it ended."""
        ids, found, said = list(body["prompt"]), [], []
        seeded = torch.Generator().manual_seed((body["seed"] or 0) % (1 << 62))
        heat = body["temperature"] or 1.0
        with self.lock, torch.no_grad():
            if body["model"] in self.adapters:
                self.model.set_adapter(body["model"])
            while len(found) < body["max_tokens"]:
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                shares = (logits / heat).softmax(-1)
                token = int(shares.argmax() if body["temperature"] == 0 else torch.multinomial(shares, 1, generator=seeded))
                said.append(float((shares if self.processed else logits.softmax(-1))[token].log()))
                ids.append(token)
                found.append(token)
                if token in body["stop_token_ids"]:
                    return found, said, "stop"
        return found, said, "length"

    def load(self, name, path):
        from peft import PeftModel

        with self.lock:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            self.model.eval()
            self.adapters.append(name)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/health":
            return self.say(200 if self.server.well else 503, {})
        base = {"id": self.server.base, "root": self.server.base, "max_model_len": self.server.max_model_len}
        return self.say(200, {"object": "list", "data": [base, *({"id": name} for name in self.server.adapters)]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))
        if self.path == "/v1/completions":
            return self.complete(body)
        if not self.server.lora:
            return self.say(404, {"detail": "Not Found"})
        name = body["lora_name"]
        if self.path == "/v1/load_lora_adapter":
            if name in self.server.adapters:
                return self.error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
            try:
                self.server.load(name, body["lora_path"])
            except Exception as error:
                return self.error(400, str(error), "BadRequestError")
            return self.say(200, f"Success: LoRA adapter '{name}' added successfully.")
        if name not in self.server.adapters:
            return self.error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.server.adapters.remove(name)
        return self.say(200, f"Success: LoRA adapter '{name}' removed successfully.")

    def complete(self, body):
        if self.server.overloaded:
            self.server.overloaded -= 1
            return self.error(503, "the server is overloaded", "ServiceUnavailableError")
        if body["model"] not in (self.server.base, *self.server.adapters):
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        begun = time.monotonic()
        while not self.server.held.wait(0.05):
            assert time.monotonic() - begun < 30
        ids, said, why = self.server.write(body)
        logprobs = {"token_logprobs": said, "tokens": [str(i) for i in ids], "top_logprobs": [], "text_offset": []}
        ids = [i + self.server.wrong for i in ids]
        choice = {"index": 0, "text": "", "logprobs": logprobs, "token_ids": ids, "finish_reason": why, "stop_reason": None}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
        return self.say(200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage})

    def error(self, status, message, kind):
        return self.say(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def say(self, status, answer):
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass  # whoever asked has gone

    def log_message(self, *_):
        pass
