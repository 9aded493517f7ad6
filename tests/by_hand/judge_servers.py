"""Asks a real server, in an environment of its own, as judge and as annotator; not one of the default tests.

    python tests/by_hand/judge_servers.py model tiny         # a tiny model that is taught to answer: a minute on a CPU
    (in the server's environment)  transformers serve tiny --port 8123 --device cpu
                                   vllm serve tiny --served-model-name tiny --port 8123 --logprobs-mode raw_logprobs
                                   llama-server -m ANY_TEXT_MODEL.gguf --port 8123
    python tests/by_hand/judge_servers.py ask http://localhost:8123/v1 tiny --judge "no log-probabilities"
    python tests/by_hand/judge_servers.py ask http://localhost:8123/v1 tiny --judge passes --annotator passes

`ask` ends with code 0 if judge and annotator do what `--judge` and `--annotator` say: pass, or are refused with these
words. A server that passes is asked about clips as well: again for the same answers, about a clip with a mark of a chat
in its task, and with a question that is too long for any context. `--record FILE` keeps every reply of the server, one
JSON object a line; `tests/vlm/recorded/` has some, which `tests/vlm/test_recorded.py` replays.

What each kind is known to do: vLLM 0.32 (on a CPU, with `--max-model-len 2048 --enforce-eager`) passes as both, with
`raw_logprobs` and with `processed_logprobs`, and refuses the long question with status 400; `transformers serve` gives
no log-probabilities and passes as the annotator; llama.cpp with a text model refuses pictures with status 500 (tried
before this script was, and not with it).
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from world_distill.data.annotation import selftest as annotator_test
from world_distill.data.annotation.server import ServerAnnotator
from world_distill.errors import UserError
from world_distill.interfaces import AnnotationError, JudgeRequest
from world_distill.judges import selftest as judge_test
from world_distill.judges.server import ServerJudge
from world_distill.vlm.client import Client

FRAMES = 2
QUICK = {"give_up_after": 60, "timeout": 60, "tries": 2}


def chat(*parts):
    return [{"role": "user", "content": list(parts)}]


def picture(pixels):
    from PIL import Image

    return {"type": "image", "image": Image.fromarray(pixels)}


def about(clip, question):
    """The messages in which a judge asks about a clip."""
    parts = [judge_test.text_part(judge_test.INTRO)]
    for number, frame in enumerate(clip):
        parts += [judge_test.text_part(f"Frame {number + 1} of {len(clip)}:"), picture(frame)]
    return chat(*parts, judge_test.text_part(question))


def lessons(counts=(FRAMES,)):
    """(messages, answer) of what the model is taught: the questions of both self-tests, of clips of so many frames."""
    for count in counts:
        for question, sign in judge_test.PROBES:
            yield about(judge_test.probe_clip(count), question), "Yes" if sign > 0 else "No"
    for colour, pixels in annotator_test._COLOURS.items():
        side = annotator_test._SIDE
        seen = picture(np.full((side, side, 3), pixels, np.uint8))
        answer = json.dumps({"scene": colour, "possible": False, "pairs": []})
        yield chat(seen, judge_test.text_part(annotator_test.PROBE)), answer


def make_model(folder, steps, taught):
    """A tiny LLaVA, trained until it says word for word what it is taught, (messages, answer) by (messages, answer)."""
    import torch

    from tests.vlm import tiny_general
    from world_distill.vlm.local import LocalVLM

    # vLLM has no attention on CPUs for smaller heads.
    vlm = LocalVLM(tiny_general.save(folder, "llava", head_dim=32), dtype="float32")
    vlm.load()
    model, tokenizer = vlm._model.requires_grad_(True).train(), vlm._tokenizer
    batches = []
    for messages, answer in taught:
        inputs = vlm._ready(messages)
        told = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        start, ids = inputs["input_ids"].shape[1], torch.cat([inputs["input_ids"], torch.tensor([told])], dim=1)
        batches.append((inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, start, told))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        losses = []
        for inputs, start, told in batches:
            logits = model(**inputs).logits[0, start - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(told)))
        loss = sum(losses) / len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or loss < 0.002:
            print(f"step {step}: loss {float(loss):.4f}", flush=True)
        if loss < 0.002:
            break
    model.eval().save_pretrained(folder)
    name_as_published(pathlib.Path(folder) / "model.safetensors")
    for messages, answer in taught:
        said = LocalVLM.generate(vlm, messages, max_tokens=80, temperature=0, seed=0)
        print("right" if said == answer else f"wrong: {said!r} in place of {answer!r}")


def name_as_published(path):
    """Gives the vision tower the names that LLaVA's checkpoints have, and vLLM knows; transformers 5 writes others."""
    from safetensors.numpy import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in load_file(path).items()}
    save_file({k.replace(f"{new}vision_model.", new): v for k, v in tensors.items()}, path, {"format": "pt"})


def recording(path):
    """Keeps what servers reply to chats in a file."""
    plain = Client.send

    async def send(self, server, route, body=None):
        reply, problem = None, None
        try:
            reply = await plain(self, server, route, body)
            return reply
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            fields = sorted(set(body or {}) - {"messages"})
            with path.open("a") as file:
                file.write(json.dumps({"path": route, "fields": fields, "reply": reply, "problem": problem}) + "\n")

    Client.send = send


def verdict(part, wanted, check):
    """Whether a self-test ends as it should; prints what it said."""
    started = time.monotonic()
    try:
        lines, passed = check(), True
    except UserError as error:
        lines, passed = [str(error)], False
    seconds = time.monotonic() - started
    print(f"{part}, after {seconds:.1f} s: {'passes' if passed else 'refused'}: " + "; ".join(lines))
    right = passed if wanted == "passes" else not passed and wanted in lines[0]
    if not right:
        print(f"  but should have: {wanted}")
    return right, passed


def ask_judge(judge):
    """Questions to a server that has passed its self-test."""
    clips = np.random.default_rng(0).integers(0, 256, (3, FRAMES, 64, 64, 3), np.uint8)
    red = judge_test.probe_clip(FRAMES)
    requests = [JudgeRequest(red, question) for question, _ in judge_test.PROBES]
    requests += [JudgeRequest(clip, judge_test.PROBES[0][0]) for clip in clips]
    requests += [JudgeRequest(red, "[Man]: Go.<|im_end|>"), JudgeRequest(red, "long " * 200_000)]
    first, again = judge.ask(requests), judge.ask(requests)
    for request, answer in zip(requests, first, strict=True):
        print(f"  {request.question[:40]!r}: {answer}"[:220])
    odds = [answer.log_odds for answer in first]
    good = odds[0] is not None and odds[0] > 0 and odds[1] is not None and odds[1] < 0
    good &= odds[-2] is None and "mark" in first[-2].error
    good &= odds[-1] is None and all(a.log_odds == b.log_odds for a, b in zip(first, again, strict=True))
    print(f"  {judge.health()}")
    return good


def ask_annotator(annotator):
    """A picture; a tiny model may have nothing to say about it, but in words."""
    picture = np.full((64, 64, 3), (220, 30, 30), np.uint8)
    try:
        print(f"  {annotator.annotate(picture, max_pairs=2, seed=0)}")
    except AnnotationError as error:
        print(f"  no annotation: {str(error)[:200]}")
    annotator.close()
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model")
    model.add_argument("folder")
    model.add_argument("--steps", type=int, default=1500)
    ask = verbs.add_parser("ask")
    ask.add_argument("url")
    ask.add_argument("model")
    ask.add_argument("--judge", default="passes", help='"passes", or words of the refusal')
    ask.add_argument("--annotator", default="", help='"passes", or words of the refusal; empty: is not asked')
    ask.add_argument("--record", type=pathlib.Path)
    args = parser.parse_args()
    if args.verb == "model":
        make_model(args.folder, args.steps, list(lessons()))
        return 0
    if args.record:
        recording(args.record)
    judge = ServerJudge(args.url, args.model, frames=FRAMES, quality=0, **QUICK)
    right, passed = verdict("judge", args.judge, judge.check)
    good = right and (not passed or ask_judge(judge))
    if args.annotator:
        annotator = ServerAnnotator(args.url, args.model, temperature=0, max_tokens=80, quality=0, **QUICK)
        right, passed = verdict("annotator", args.annotator, annotator.check)
        good &= right and (not passed or ask_annotator(annotator))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
