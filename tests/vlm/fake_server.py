"""A server that answers like vLLM, SGLang or a hosted model, on loopback, and misbehaves when told to.

Its model is a hash: the log-odds of an answer are a function of the pictures and the question, so that each answer can
be checked. The shapes of the replies are those of the servers' documentation.
"""

import asyncio
import hashlib
import json
import math
import threading

from world_distill.judges.selftest import PROBES

VOCABULARY = {
    "yes": 11,
    "Yes": 12,
    " yes": 13,
    " Yes": 14,
    "YES": 15,
    "no": 21,
    "No": 22,
    " no": 23,
    " No": 24,
    "NO": 25,
}
SHARES = {"Yes": 0.7, "yes": 0.2, " Yes": 0.1, "No": 0.6, "no": 0.3, " no": 0.1}  # of a word's probability
OTHERS = {f"w{i}": 100 + i for i in range(30)}
STYLES = ("vllm_new", "vllm_old", "sglang", "hosted", "llamacpp", "lmdeploy", "completions")
_VLLM_FIELDS = {"chat_template_kwargs", "logprob_token_ids", "return_tokens_as_token_ids"}


def truth(urls, question):
    """The model's log-odds: right about the probes, and by a hash about everything else."""
    known = {text: 5.0 * sign for text, sign in PROBES}
    digest = hashlib.sha256("|".join([*urls, question]).encode()).digest()
    return known.get(question, int.from_bytes(digest[:4], "big") / 2**32 * 12 - 6)


def parts_of(body):
    """(image URLs, question) of a request."""
    content = body["messages"][-1]["content"]
    return [c["image_url"]["url"] for c in content if c["type"] == "image_url"], content[-1]["text"]


class FakeServer:
    """A context manager.

    Args:
      fault: called with the number of a chat request, from 0, and its body: the name of a fault (see `_misbehave` and
        `_reply`), or None.
    """

    def __init__(
        self, style="vllm_new", *, model="judge", key=None, latency=0.0, mass=0.96, fault=lambda n, body: None, port=0
    ):
        self.style, self.model, self.key, self.latency, self.mass, self.fault = style, model, key, latency, mass, fault
        self.chats, self.bodies, self.auth, self.answered, self.port = 0, [], set(), [], port
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        started = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.tasks = set()

        async def start():
            self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**22)
            self.port = self.server.sockets[0].getsockname()[1]
            started.set()

        async def stop():
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

        def run():
            self.loop.run_until_complete(start())
            self.loop.run_forever()
            self.loop.run_until_complete(stop())
            self.loop.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def _serve(self, reader, writer):
        self.tasks.add(task := asyncio.current_task())
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                size = int(headers.get("content-length", 0))
                assert size < 2**26
                body = json.loads(await reader.readexactly(size)) if size else None
                self.auth.add(headers.get("authorization"))
                if not await self._handle(writer, method, path, body, headers):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.tasks.discard(task)
            writer.close()

    async def _handle(self, writer, method, path, body, headers):
        """Answers one request; False closes the connection."""
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return self._send(writer, 401, error(f"Incorrect API key provided: {headers.get('authorization')}"))
        if (method, path) == ("GET", "/v1/models"):
            owner = "llamacpp" if self.style == "llamacpp" else "vllm" if self.style.startswith("vllm") else "library"
            models = [{"id": self.model, "object": "model", "owned_by": owner}]
            return self._send(writer, 200, {"object": "list", "data": models})
        if (method, path) == ("POST", "/tokenize") and self.style != "hosted":
            tokens = [VOCABULARY[body["prompt"]]] if body["prompt"] in VOCABULARY else [1, 2]
            tokens = [0, *tokens] if self.style == "bos" else tokens
            if self.style == "llamacpp":  # reads another field
                return self._send(writer, 200, {"tokens": body.get("content", [])})
            return self._send(writer, 200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens})
        if (method, path) != ("POST", "/v1/chat/completions"):
            return self._send(writer, 404, error("Not Found"))
        number, self.chats = self.chats, self.chats + 1
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.latency)
            return await self._misbehave(writer, self.fault(number, body), body)
        finally:
            self.in_flight -= 1

    async def _misbehave(self, writer, fault, body):
        match fault:
            case "hang":
                await asyncio.sleep(60)
            case "reset":
                return False
            case "cut":
                whole = json.dumps(self._reply(body, None)).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole[: len(whole) // 2])
                return False
            case "truncated":
                return self._send(writer, 200, json.dumps(self._reply(body, None))[:-40])
            case "html":
                return self._send(writer, 200, "<html>Bad gateway</html>")
            case "gateway":
                return self._send(writer, 200, error("upstream failed", 502))
            case "busy":
                return self._send(writer, 429, error("Too many requests"), {"Retry-After": "0.02"})
            case "busy_date":
                return self._send(writer, 429, error("Slow down"), {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
            case "busy_long":
                return self._send(writer, 429, error("Too many requests"), {"Retry-After": "3600"})
            case "quota":
                return self._send(writer, 429, error("You exceeded your quota", "insufficient_quota"))
            case int(status):
                return self._send(writer, status, error(f"status {status} for key {self.key}"))
            case (int(status), str(content)):  # word for word
                return self._send(writer, status, content)
        if refusal := self._refusal(body):
            return self._send(writer, 400, error(refusal))
        if fault is None:
            self.answered.append(self._seen(body))
        return self._send(writer, 200, self._reply(body, fault))

    def _seen(self, body):
        return parts_of(body)

    def _refusal(self, body):
        """Why this kind of server does not take a request, or None."""
        unknown = _VLLM_FIELDS & body.keys() if self.style == "hosted" else None
        return f"Unrecognized request argument supplied: {min(unknown)}" if unknown else None

    def _send(self, writer, status, content, headers=None):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        return True

    def _reply(self, body, fault):
        """A chat completion in this server's shape, or with a fault in it."""
        log_odds = truth(*parts_of(body))
        p_yes = self.mass / (1 + math.exp(-log_odds))
        of_word = {"y": p_yes, "n": self.mass - p_yes}
        probabilities = {t: max(of_word[t.strip()[0].lower()] * SHARES.get(t, 0.0), 1e-9) for t in VOCABULARY}
        probabilities |= {t: (1 - self.mass) / 2**i for i, t in enumerate(OTHERS, 1)}
        if fault in ("thinks", "other_words"):
            said = "<think>" if fault == "thinks" else "Certainly"
            probabilities = {said: 0.99} | {t: p * 0.01 for t, p in probabilities.items()}
        ids = VOCABULARY | OTHERS | {"<think>": 500, "Certainly": 501}
        wanted = body.get("logprob_token_ids") if self.style == "vllm_new" else None
        if self.style == "lmdeploy" and body.get("temperature") == 0:  # what sampling leaves over
            fault = "sampled_only"
        best = sorted(probabilities, key=probabilities.get, reverse=True)
        if fault in ("sampled_only", "masked", "masked_null"):
            probabilities = {t: float(t == best[0]) for t in best}
        listed = [t for t in best if ids[t] in wanted] if wanted else best[: body["top_logprobs"]]
        as_ids = body.get("return_tokens_as_token_ids") and self.style.startswith("vllm")

        def entry(token):
            name = f"token_id:{ids[token]}" if as_ids else token
            none = None if fault == "masked_null" else -3.4e38
            log_prob = math.log(probabilities[token]) if probabilities[token] else none
            return {"token": name, "logprob": log_prob, "bytes": list(name.encode())}

        listed = listed[:1] if fault == "sampled_only" else listed
        content = {"content": [entry(best[0]) | {"top_logprobs": [entry(t) for t in listed]}]}
        if self.style == "completions":
            top = {t: math.log(probabilities[t]) for t in listed}
            content = {"tokens": best[:1], "token_logprobs": [top[best[0]]], "top_logprobs": [top]}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": best[0], "reasoning": None, "refusal": None},
                    "logprobs": None if fault == "no_logprobs" else content,
                    "finish_reason": "length",
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
        }


def error(message, code=None):
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}
