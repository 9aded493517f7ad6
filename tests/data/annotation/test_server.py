"""The annotator behind a server: the model's tasks from each kind of server, whatever goes wrong on the way."""

import concurrent.futures
import gc
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import logging
from PIL import Image

from tests.vlm.fake_annotations import CONTENT_FAULTS, STYLES, AnnotationServer, truth
from tests.vlm.fake_server import parts_of
from world_distill.data.annotation.annotate import annotate_images
from world_distill.data.annotation.prompt import Prompt, load_prompt
from world_distill.data.annotation.request import Form
from world_distill.data.annotation.selftest import PROBE
from world_distill.data.annotation.selftest import _colour as named_colour
from world_distill.data.annotation.server import ServerAnnotator
from world_distill.data.records.reader import AnnotatedRecord, RecordError, RecordReader
from world_distill.errors import UserError
from world_distill.interfaces import AnnotationError
from world_distill.vlm.frames import data_urls

QUICK = {"backoff": 0.01, "backoff_limit": 0.05, "timeout": 5, "give_up_after": 5, "quality": 0}
VLLM = {"chat_template_kwargs", "max_tokens", "seed", "temperature"}
TRANSPORT_FAULTS = ("reset", "cut", "truncated", "html", "gateway", "busy", 408, 500, 503)


def annotator_of(*servers, **options):
    return ServerAnnotator([getattr(s, "url", s) for s in servers], "judge", **QUICK | options)


def pictures(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8))


def expected(image, seed=7):
    return truth(data_urls(image[None], frames=2, max_side=1024, quality=0)[0], seed, AnnotationServer.max_pairs)


def has_tasks(count):
    """Pictures with something to do."""
    return [image for image in pictures(3 * count + 8) if expected(image)][:count]


def ask(annotator, image, seed=7):
    return annotator.annotate(image, max_pairs=3, seed=seed)


def after_the_test(*faults):
    """Faults in this order for the first requests about pictures."""
    queue = list(faults)
    return lambda number, body: queue.pop(0) if queue and parts_of(body)[1] != PROBE else None


@pytest.fixture
def lines(monkeypatch):
    said = []
    for level in ("warning", "info"):
        monkeypatch.setattr(logging, level, lambda message, *args: said.append(message % args))
    return said


# ---- Kinds of servers

ALL = ["chat_template_kwargs", "max_tokens", "seed", "temperature", "response_format"]


@pytest.mark.parametrize(
    "style, output, fields",
    [
        ("vllm_new", "json_schema", VLLM | {"response_format"}),
        ("vllm_old", "structured_outputs", VLLM | {"structured_outputs"}),
        ("hosted", "json_schema", {"response_format", "max_completion_tokens", "seed"}),
        ("plain", "words", VLLM),
    ],
)  # fmt: skip
def test_every_kind_of_server_gives_its_models_pairs(style, output, fields):
    assert style in STYLES
    images = pictures(12)
    with AnnotationServer(style) as server:
        annotator = annotator_of(server)
        assert [ask(annotator, image) for image in images] == [expected(image) for image in images]
        assert f"asked for {output}" in annotator.check()[0]
        annotator.close()
        sent = server.bodies[-1]
    assert sent.keys() == {"model", "messages"} | fields and sent["seed"] == 7
    health = annotator.health()
    assert health["answers"] == 12 and health["pairs"] == sum(len(expected(image)) for image in images)
    assert health["empty"] == sum(not expected(image) for image in images) > 0
    assert health["retries"] == health["failed"] == health["partial"] == annotator.health()["answers"] == 0


def test_instructions_come_first_and_the_picture_before_the_request():
    with AnnotationServer() as server:
        annotator = annotator_of(server, seconds=2.5, thinking=True, extra={"top_p": 0.9})
        annotator.annotate(pictures(1)[0], max_pairs=4, seed=1)
        annotator.close()
        sent = server.bodies[-1]
    before, picture, after = sent["messages"][0]["content"]
    assert "2.5 seconds" in before["text"] and "write 4 tasks" in before["text"] and '"pairs": [{' in before["text"]
    assert picture["type"] == "image_url" and "write the 4 tasks" in after["text"]
    assert sent["chat_template_kwargs"] == {"enable_thinking": True} and sent["top_p"] == 0.9


@pytest.mark.parametrize(
    "refused", [["seed"], ["response_format"], ["chat_template_kwargs", "temperature"], ["max_tokens", "seed"], ALL]
)
def test_a_server_that_names_no_field_keeps_all_that_it_takes(refused):
    fault = lambda n, body: (400, "Bad Request") if set(refused) & body.keys() else None  # noqa: E731
    with AnnotationServer(fault=fault) as server:
        annotator = annotator_of(server)
        annotator.check()
        annotator.close()
        sent = server.bodies[-1]
        (image,) = has_tasks(1)
        annotator.annotate(image, max_pairs=3, seed=7)
        sent = server.bodies[-1]
        annotator.close()
    others = {"max_completion_tokens"} if "max_tokens" in refused else set()
    others |= {"structured_outputs"} if "response_format" in refused else set()
    assert sent.keys() == ({"model", "messages"} | set(ALL)) - set(refused) | others


@pytest.mark.parametrize(
    "refusal, form",
    [
        ('[{"error": {"code": 400, "message": "unknown name: seed"}}]', Form(seed=False)),
        (
            '{"detail": [{"loc": ["body", "chat_template_kwargs"], "msg": "extra inputs are not permitted"}]}',
            Form(thinking=False),
        ),
        ('{"message": "Unsupported parameter: \'temperature\'"}', Form(temperature=False)),
        ('data: {"error": {"message": "json_schema is not supported"}}', Form(output="structured_outputs")),
    ],
)
def test_only_the_field_that_is_meant_is_left_out(refusal, form):
    refused = []
    fault = lambda n, body: (400, refusal) if not n else refused.append(n)  # noqa: E731
    with AnnotationServer(fault=fault) as server:
        annotator = annotator_of(server)
        annotator.check()
        annotator.close()
    assert annotator._pool.servers[0].form == form and len(refused) == 2


def test_a_server_without_any_form_is_refused_in_its_own_words():
    with AnnotationServer(fault=lambda n, body: (422, '{"detail": "context length of 512"}')) as server:
        with pytest.raises(UserError, match="(?s)context length of 512.*vLLM: --max-model-len.*max_tokens has to fit"):
            annotator_of(server).check()
        assert server.chats == 3
    with AnnotationServer(fault=lambda n, body: (500, '{"error": "image input is not supported"}')) as server:
        started = time.monotonic()
        with pytest.raises(UserError, match="image input is not supported"):
            annotator_of(server).check()
        assert server.chats == 3 and time.monotonic() - started < 2
    with AnnotationServer(fault=lambda n, body: (400, "unknown name: min_p")) as server:
        with pytest.raises(UserError, match="'min_p' comes from annotator.options.extra"):
            annotator_of(server, extra={"min_p": 0.1}).check()


@pytest.mark.parametrize(
    "said, colour",
    [
        ('{"scene": "red"}', "red"), ("Sure: it is red or blue? {\"scene\": \"A reddish square.\"}", "red"),
        ('{"scene": "It is not blue but red."}', "red"), ('{"scene": "This isn\'t red; blue."}', "blue"),
        ('{"scene": "red or blue"}', None), ('{"scene": "covered"}', None), ("plain blue []", "blue"),
    ],
)  # fmt: skip
def test_a_colour_among_other_words(said, colour):
    assert named_colour(said) == colour


# ---- Self-test


@pytest.mark.parametrize(
    "options, fault, text",
    [
        ({"model": "other"}, None, "does not serve 'judge', but other: set annotator.options.model"),
        ({}, "thinks", "thoughts alone, or empty.*annotator.options.thinking"),
        ({}, "declines", "no JSON in the answer .I'm sorry"),
        ({}, "declines_apart", "the model declines: 'I cannot"),
        ({}, 400, "status 400.*max_tokens has to fit"),
        ({}, 403, "may not use the model"),
        ({"key": "right"}, None, "refused with status 401: .*api_key_env"),
    ],
)
def test_a_server_of_no_use_is_refused_in_words(options, fault, text):
    with AnnotationServer(**options, fault=lambda n, body: fault) as server:
        annotator = annotator_of(server)
        for call in (annotator.check, lambda: ask(annotator, pictures(1)[0])):
            with pytest.raises(UserError, match=f"(?s){text}"):
                call()
        annotator.close()


def test_a_model_that_does_not_see_is_refused():
    with AnnotationServer() as server:
        server.blind = True
        with pytest.raises(UserError, match="about a blue picture: it does not see it"):
            annotator_of(server).check()


def test_thoughts_that_were_not_asked_for_are_told_and_ignored(lines):
    with AnnotationServer(fault=lambda n, body: "thinks_apart") as server:
        (image,) = has_tasks(1)
        assert ask(annotator_of(server), image) == expected(image)
    assert any("thinks before it answers" in line for line in lines)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"model": ""}, "name of its model"), ({"max_side": 0}, "max_side"), ({"temperature": 3}, "temperature"),
        ({"seconds": 0}, "seconds above 0"),
        ({"prompt": "/nowhere"}, "annotator.options.prompt: /nowhere: .*format.txt"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "the annotator's API key .*NOT_SET_ANYWHERE: not set"),
        ({"extra": "{"}, "the annotator's extra is a JSON object"), ({"tokens_per_minute": -1}, "tokens_per_minute"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, text):
    with pytest.raises(UserError, match=text):
        ServerAnnotator(**{"servers": "http://host/v1", "model": "m"} | options)


# ---- The prompt


def test_prompts_are_files_and_part_of_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    make = lambda **o: ServerAnnotator(**{"servers": ("http://me:word@host/v1",), "model": "m"} | o)  # noqa: E731
    own = load_prompt()
    for name in ("instructions", "format", "request"):
        (tmp_path / f"{name}.txt").write_text(getattr(own, name) + "\n")
    same = [{"prompt": str(tmp_path)}, {"servers": "http://b/v1"}, {"timeout": 1}, {"api_key_env": "SOME_KEY"}]
    assert {make(**o).name for o in same} == {make().name}
    (tmp_path / "format.txt").write_text("As you like {it}.")
    other = [
        {"prompt": str(tmp_path)}, {"seconds": 1}, {"max_side": 8}, {"quality": 0}, {"max_tokens": 9},
        {"temperature": 0}, {"thinking": True}, {"extra": '{"top_p": 1}'}, {"model": "n"},
    ]  # fmt: skip
    annotators = [make(), *(make(**o) for o in other)]
    assert len({a.name for a in annotators}) == len(other) + 1
    assert not any(w in a.name + repr(a) for a in annotators for w in ("host", "word", "secret"))


@pytest.mark.parametrize("text, message", [
    ("{agent}", r"unknown fields \['agent'\]; there are {max_pairs}, {seconds}"), ("{max_pairs.real}", "unknown"),
    ("{seconds:>9}", "unknown"), ("{", "written twice"), (" ", "instructions.txt is empty"),
])  # fmt: skip
def test_prompts_with_other_fields_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Prompt(text, "f", "r")


# ---- What goes wrong


@pytest.mark.parametrize("fault", [*TRANSPORT_FAULTS, *CONTENT_FAULTS])
def test_what_passes_is_tried_again(fault):
    (image,) = has_tasks(1)
    with AnnotationServer(fault=after_the_test(fault)) as server:
        annotator = annotator_of(server)
        assert ask(annotator, image) == expected(image)
        annotator.close()
    assert annotator.health()["retries"] == 1


def test_answers_that_stay_unusable_are_asked_for_with_other_seeds_and_then_given_up():
    image, other = has_tasks(2)
    with AnnotationServer(fault=after_the_test(*["declines"] * 4)) as server:
        annotator = annotator_of(server, tries=4)
        with pytest.raises(AnnotationError, match="gave up after 4 attempts; .*begins with .I'm sorry"):
            ask(annotator, image)
        assert ask(annotator, other) == expected(other)
        annotator.close()
        seeds = [body["seed"] for body in server.bodies if parts_of(body)[1] != PROBE]
    assert seeds == [7, 7, 8, 9, 7] and annotator.health()["failed"] == 1


def test_of_answers_that_are_all_cut_off_the_fullest_is_taken(lines):
    (image,) = has_tasks(1)
    with AnnotationServer(fault=after_the_test("cut_json", "thinks", "cut_json")) as server:
        annotator = annotator_of(server, tries=3)
        pairs = ask(annotator, image)
        annotator.close()
    assert 0 < len(pairs) < 3 and pairs == expected(image)[: len(pairs)]
    assert annotator.health()["partial"] == 1 and any("cut off" in line for line in lines)


def test_a_refusal_is_of_the_picture_or_of_all():
    image, other = has_tasks(2)
    with AnnotationServer(fault=after_the_test(400, 413, None, 403)) as server:
        annotator = annotator_of(server)
        for status in (400, 413):
            with pytest.raises(AnnotationError, match=f"status {status}"):
                ask(annotator, image)
        assert ask(annotator, other) == expected(other)
        with pytest.raises(UserError, match="403"):
            ask(annotator, other)
        annotator.close()


def test_a_server_that_is_not_there_is_an_error_of_the_picture():
    annotator = annotator_of("http://127.0.0.1:9/v1", give_up_after=0.1)
    with pytest.raises(AnnotationError, match="Connect"):
        ask(annotator, pictures(1)[0])
    with pytest.raises(UserError, match="no annotator server: cannot be reached"):
        annotator.check()
    annotator.close()


# ---- Many at once


def hit_each_once(draws, share, spoilt=None):
    """Faults for a share of the requests; of content at most once a picture."""
    kinds, spoilt = [*TRANSPORT_FAULTS, *CONTENT_FAULTS], set() if spoilt is None else spoilt

    def fault(number, body):
        kind = kinds[number % len(kinds)] if draws[number] < share else None
        if kind in CONTENT_FAULTS:
            (url,), question = parts_of(body)
            if question == PROBE or url in spoilt:
                return None
            spoilt.add(url)
        return kind

    return fault


def test_none_is_lost_doubled_or_wrong_with_a_fifth_of_the_requests_failing():
    images, draws, spoilt = pictures(400), np.random.default_rng(1).random(100_000), set()
    with (
        AnnotationServer(fault=hit_each_once(draws, 0.2, spoilt)) as one,
        AnnotationServer("plain", fault=hit_each_once(draws[::-1], 0.2, spoilt)) as two,
    ):
        annotator = annotator_of(one, two, give_up_after=60, tries=20, concurrency=16)
        answers = ask_all(annotator, images)
        annotator.close()
        answered = [urls[0] for s in (one, two) for urls, question in s.answered if question != PROBE]
    assert answers == [expected(image) for image in images]
    assert len(answered) == len(set(answered)) == 400
    assert annotator.health()["retries"] > 60


def test_records_are_the_same_with_and_without_faults(tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.repeat(np.repeat(pictures(12), 4, 1), 4, 2)):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    paths, draws = sorted((tmp_path / "images").iterdir()), np.random.default_rng(2).random(10_000)
    for name, share in (("calm", 0.0), ("rough", 0.4)):
        with AnnotationServer(fault=hit_each_once(draws, share)) as server:
            annotator = annotator_of(server, tries=20)
            counts = annotate_images(paths, annotator, tmp_path / name, name="set", max_pairs=3, seed=0)
            annotator.close()
            assert counts["kept"] == counts["pairs"] > 0 and (annotator.health()["retries"] > 0) == (name == "rough")
    calm, rough = (RecordReader(tmp_path / name, "set", AnnotatedRecord) for name in ("calm", "rough"))
    assert calm.fingerprint == rough.fingerprint


# ---- Threads and secrets


def loops():
    return sum(thread.name == "vlm" for thread in threading.enumerate())


def ask_all(annotator, images):
    with concurrent.futures.ThreadPoolExecutor(annotator.concurrency) as threads:
        return list(threads.map(lambda image: ask(annotator, image), images))


def test_as_many_requests_as_threads_are_under_way_and_closing_ends_the_loop():
    gc.collect()  # what other tests left behind
    before = loops()
    with AnnotationServer(latency=0.05) as server:
        annotator = annotator_of(server, concurrency=6)
        ask_all(annotator, pictures(18))
        assert server.most_in_flight == 6 and loops() == before + 1
        annotator.close()
        annotator.close()
        assert loops() == before
        assert ask(annotator, pictures(1)[0]) == expected(pictures(1)[0])  # opens again
        del annotator
        gc.collect()
        assert loops() == before


def test_closing_frees_the_threads_that_wait():
    with AnnotationServer(latency=30) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        annotator = annotator_of(server, timeout=60)
        waiting = threads.submit(ask, annotator, pictures(1)[0])
        while not server.in_flight:
            time.sleep(0.01)
        annotator.close()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result(5)


def test_tokens_a_minute_are_kept():
    with AnnotationServer() as server:  # 100 tokens a reply
        annotator = annotator_of(server, tokens_per_minute=100 * 60 * 40, max_tokens=100)
        annotator.check()
        started = time.monotonic()
        for image in pictures(20):
            ask(annotator, image)
        assert 0.4 < time.monotonic() - started < 5
        annotator.close()


ENDS = """
import sys
import numpy as np
from world_distill.data.annotation.server import ServerAnnotator
annotator = ServerAnnotator(sys.argv[1], "judge")
print(len(annotator.annotate(np.zeros((8, 8, 3), np.uint8), max_pairs=3, seed=7)))
"""


def test_a_program_that_does_not_close_it_ends():
    with AnnotationServer() as server:
        done = subprocess.run([sys.executable, "-c", ENDS, server.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() in "03" and not done.stderr


def test_the_key_is_sent_and_seen_nowhere(monkeypatch, caplog, tmp_path):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("ANNOTATOR_KEY", key)
    caplog.set_level("DEBUG")
    texts = []
    for i, image in enumerate(pictures(3)):
        Image.fromarray(np.repeat(np.repeat(image, 4, 0), 4, 1)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    for fault in ["tells_key", 500, 401, "gateway", "declines"]:
        with AnnotationServer("hosted", key=key, fault=after_the_test(*[fault] * 50)) as server:
            annotator = annotator_of(server, f"http://me:{key}@127.0.0.1:9/v1", api_key_env="ANNOTATOR_KEY", tries=2)
            try:
                texts += [repr(annotator), annotator.name, str(annotator.check())]
                annotate_images(paths, annotator, tmp_path / "out", name=f"{fault}", max_pairs=3, seed=0)
            except (UserError, AnnotationError, RecordError) as error:
                texts += [str(error), repr(error.__cause__), repr(error.__context__)]
            annotator.close()
            assert f"Bearer {key}" in server.auth
    texts += [caplog.text, *(p.read_bytes().decode("latin-1") for p in (tmp_path / "out").iterdir())]
    assert "***" in "".join(texts) and "gate ***" in (tmp_path / "out/tells_key.journal.jsonl").read_text()
    assert [text[max(0, text.index(key[:16]) - 500) :][:900] for text in texts if key[:16] in text] == []


def test_a_model_that_repeats_the_example_is_asked_again():
    example = load_prompt().format.partition("for another picture:")[2]
    body = json.dumps({"choices": [{"message": {"content": example}, "finish_reason": "stop"}]})
    (image,) = has_tasks(1)
    with AnnotationServer(fault=after_the_test((200, body))) as server:
        annotator = annotator_of(server)
        assert ask(annotator, image) == expected(image) and annotator.health()["retries"] == 1
        annotator.close()
