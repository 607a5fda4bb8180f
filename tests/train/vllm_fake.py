"""A small server that answers as vLLM does, with transformers, PEFT and llguidance behind it; no vLLM is run in these tests."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

BLOCK = 16  # ids that are remembered together


class FakeVllm(ThreadingHTTPServer):
    """`lora` off: as without --enable-lora; `processed`: as with --logprobs-mode processed_logprobs; `key`: as with --api-key."""

    daemon_threads = True

    def __init__(self, base, *, lora=True, processed=False, max_model_len=64, key="", port=0):
        from transformers import AutoModelForCausalLM

        super().__init__(("127.0.0.1", port), Answer)
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.base, self.lora, self.processed, self.max_model_len = str(base), lora, processed, max_model_len
        self.key, self.folder = key, Path(base)
        self.adapters, self.asked, self.lock = [], [], threading.Lock()
        self.overloaded, self.overloaded_as = 0, 503  # so many completions are answered so
        self.held = threading.Event()  # completions wait for it
        self.held.set()
        self.well = True
        self.away = False  # every connection is closed without a word
        self.wrong = 0  # added to every id, as another vocabulary would
        self.says = []  # ids that are written in their turn, instead of what the model would
        self.guidance = True  # whether it keeps replies to a grammar
        self.remembered = set()  # what blocks of ids it has read

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def begin_anew(self):
        """As if it had been started once more: no adapter, and nothing remembered."""
        self.adapters.clear()
        self.remembered.clear()

    def write(self, body):
        """Id after id, each with its log-probability and the likeliest, and why it ended with the last."""
        ids = list(body["prompt"])
        seeded = torch.Generator().manual_seed((body.get("seed") or 0) % (1 << 62))
        heat = body["temperature"] or 1.0
        form = self.form(body.get("structured_outputs"))
        shifts = {int(id): value for id, value in (body.get("logit_bias") or {}).items()}
        for number in range(1, body["max_tokens"] + 1):
            with self.lock, torch.no_grad():
                if body["model"] in self.adapters:
                    self.model.set_adapter(body["model"])
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                elif self.adapters:
                    with self.model.disable_adapter():
                        logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                else:
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                plain = logits.log_softmax(-1)
                for id, value in shifts.items():
                    logits[id] += value
                if form is not None:
                    logits[~form.allowed(len(logits))] = -torch.inf
                shares = (logits / heat).softmax(-1)
                token = int(shares.argmax() if body["temperature"] == 0 else torch.multinomial(shares, 1, generator=seeded))
                if self.says:
                    token = self.says.pop(0)
            said = float(shares[token].log() if self.processed else plain[token])
            top = {
                f"token_id:{id}": float(plain[id]) for id in [token, *plain.topk(body.get("logprobs") or 0).indices.tolist()]
            }
            ids.append(token)
            if form is not None and token != form.end:
                form.take(token)
            stopped = token if token in (body.get("stop_token_ids") or ()) else None
            over = stopped is not None or (token == self.end and not body.get("ignore_eos"))
            why = "stop" if over else "length" if number == body["max_tokens"] else None
            yield token, said, top, why, stopped
            if why:
                return

    @property
    def end(self):
        return self.model.config.eos_token_id if isinstance(self.model.config.eos_token_id, int) else -1

    def form(self, asked):
        return Form(self.folder, self.end, asked) if asked else None

    def found(self, body):
        """Ids of the prompt that it remembers, in whole blocks and never the last; what it reads now it remembers too."""
        ids, found, key = body["prompt"], 0, f"{body.get('cache_salt')} {body['model']}"
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = hashlib.sha256(f"{key} {ids[start : start + BLOCK]}".encode()).hexdigest()
            found += BLOCK if key in self.remembered and found == start else 0
            self.remembered.add(key)
        return min(found, (len(ids) - 1) // BLOCK * BLOCK)

    def load(self, name, path):
        from peft import PeftModel

        with self.lock:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            self.model.eval()
            self.adapters.append(name)


class Form:
    """What the backend `guidance` keeps a reply to."""

    def __init__(self, folder, end, asked):
        from llguidance import LLMatcher, LLTokenizer
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        [(kind, text)] = asked.items()
        make = {
            "json": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }
        self.tokenizer = LLTokenizer(str(folder / "tokenizer.json"), eos_token=[end] if end >= 0 else None)
        self.matcher = LLMatcher(self.tokenizer, make[kind](text), log_level=0)
        self.mask, self.fill, self.end = allocate_token_bitmask(1, self.tokenizer.vocab_size), fill_next_token_bitmask, end
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())

    def allowed(self, rows):
        found = torch.zeros(rows, dtype=torch.bool)
        if self.matcher.is_stopped():
            found[self.end] = True
            return found
        self.fill(self.matcher, self.mask)
        bits = ((torch.from_numpy(self.mask[0])[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).reshape(-1).bool()
        found[: min(rows, len(bits))] = bits[:rows]
        return found

    def take(self, token):
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        super().handle_one_request()
        self.close_connection = self.close_connection or self.server.away

    def do_GET(self):
        if self.server.away:
            return None
        if self.path == "/health":
            return self.say(200 if self.server.well else 503, {})
        if not self.may():
            return None
        base = {"id": self.server.base, "root": self.server.base, "max_model_len": self.server.max_model_len}
        return self.say(200, {"object": "list", "data": [base, *({"id": name} for name in self.server.adapters)]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.away:
            return None
        self.server.asked.append((self.path, body))
        if not self.may():
            return None
        if self.path == "/v1/completions":
            return self.complete(body)
        if self.path == "/tokenize":
            return self.tokenize(body)
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

    def may(self):
        if self.server.key and self.headers.get("authorization") != f"Bearer {self.server.key}":
            self.say(401, {"error": "Unauthorized"})
            return False
        return True

    def tokenize(self, body):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.server.folder / "tokenizer.json"))
        ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"]).ids
        return self.say(200, {"count": len(ids), "max_model_len": self.server.max_model_len, "tokens": ids})

    def complete(self, body):
        if self.server.overloaded:
            self.server.overloaded -= 1
            return self.error(self.server.overloaded_as, "the server is overloaded", "ServiceUnavailableError")
        if body["model"] not in (self.server.base, *self.server.adapters):
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if len(body["prompt"]) + body["max_tokens"] > self.server.max_model_len:
            return self.error(
                400, f"This model's maximum context length is {self.server.max_model_len} tokens.", "BadRequestError"
            )
        try:
            if not self.server.guidance and body.get("structured_outputs"):
                raise ValueError("Failed to convert the grammar from Lark to EBNF.")
            self.server.form(body.get("structured_outputs"))
        except ValueError as error:
            return self.error(400, str(error), "BadRequestError")
        begun = time.monotonic()
        while not self.server.held.wait(0.05):
            assert time.monotonic() - begun < 30
        cached = self.server.found(body)
        if body.get("stream"):
            return self.stream(body, cached)
        found = list(self.server.write(body))
        ids, logprobs = [one[0] + self.server.wrong for one in found], self.logprobs(body, found)
        usage = self.usage(body, len(ids), cached)
        choice = {
            "index": 0,
            "text": "",
            "logprobs": logprobs,
            "token_ids": ids,
            "finish_reason": found[-1][3],
            "stop_reason": None,
        }
        return self.say(200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage})

    def stream(self, body, cached):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        count = 0
        try:
            for one in self.server.write(body):
                count += 1
                choice = {
                    "index": 0,
                    "text": "",
                    "logprobs": self.logprobs(body, [one]),
                    "finish_reason": one[3],
                    "stop_reason": one[4],
                    "token_ids": [one[0] + self.server.wrong],
                }
                self.event({"object": "text_completion", "model": body["model"], "choices": [choice]})
            if (body.get("stream_options") or {}).get("include_usage"):
                self.event({"object": "text_completion", "choices": [], "usage": self.usage(body, count, cached)})
            self.event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            pass  # whoever asked has gone

    def event(self, found):
        data = f"data: {found if isinstance(found, str) else json.dumps(found)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def logprobs(self, body, found):
        if body.get("logprobs") is None:
            return None
        return {
            "token_logprobs": [one[1] for one in found],
            "tokens": [f"token_id:{one[0]}" for one in found],
            "top_logprobs": [one[2] for one in found],
            "text_offset": [],
        }

    def usage(self, body, count, cached):
        return {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

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
