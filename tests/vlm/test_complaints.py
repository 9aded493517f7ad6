"""Refusals: the server's own words in every form, the field that is meant, and the flag that would help."""

import json

import pytest

from world_distill.vlm.complaints import advice, is_final, is_page, named_fields, server_kind, server_words

ECHO = "data:image/jpeg;base64," + "A" * 5000


@pytest.mark.parametrize(
    "body, words",
    [
        ('{"error": {"message": "no such model", "type": "x", "param": null}}', "no such model"),
        ('{"error": {"message": "bad", "param": "seed"}}', "bad; param seed"),
        ('[{"error": {"code": 400, "message": "unknown name: seed", "status": "X"}}]', "unknown name: seed"),
        ('{"error": "plain"}', "plain"),
        ('{"message": "short", "object": "error"}', "short"),
        ('{"detail": "Not Found"}', "Not Found"),
        (
            '{"detail": [{"loc": ["body", "chat_template_kwargs"], "msg": "not permitted", "input": "long"}]}',
            "body.chat_template_kwargs: not permitted",
        ),
        (
            '{"error": {"message": "invalid", '
            '"details": [{"fieldViolations": [{"field": "seed", "description": "no"}]}]}}',
            "seed: no; invalid",
        ),
        # A gateway's own message says nothing; the one that it passes on does.
        (
            json.dumps({"error": {"message": "Provider returned error", "metadata": {
                "raw": '{"error": {"message": "seed is not supported"}}', "provider_name": "X"}}}),
            "Provider returned error; seed is not supported",
        ),
        ('event: error\ndata: {"error": {"message": "too long"}}\n\ndata: [DONE]\n', "too long"),
        ("<html><body>blocked by a gateway</body></html>", "a page that begins '<html><body>blocked by a gateway"),
        ("upstream connect error", "upstream connect error"),
        ('{"code": 7}', '{"code": 7}'),
        ("", ""),
        ("[" * 5000, "[[["),
        (json.dumps({"detail": [{"msg": f"Input is {ECHO}"}]}), "Input is data:image/..."),
    ],
)  # fmt: skip
def test_the_servers_words_are_found(body, words):
    found = server_words(body)
    assert set(words.split("; ")) <= set(found.split("; ")) or found.startswith(words)
    assert len(found) <= 400 and "AAAA" not in found
    assert is_page(body) == body.startswith("<html")


FIELDS = ["chat_template_kwargs", "response_format", "max_tokens", "seed", "temperature"]


@pytest.mark.parametrize(
    "words, named",
    [
        ("unknown name: seed", ["seed"]),
        ("body.chat_template_kwargs: Extra inputs are not permitted", ["chat_template_kwargs"]),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", ["max_tokens"]),
        ("response_format: json_schema is not supported", ["response_format"]),
        ("`seed` cannot be given; temperature can", ["seed"]),  # quoted names count first
        ("the seeds of max_tokens_limit", []),
        ("Bad Request", []),
    ],
)
def test_the_field_that_is_meant(words, named):
    assert named_fields(words, FIELDS) == named


@pytest.mark.parametrize(
    "words, kind, told",
    [
        ("At most 1 image(s) may be provided in one prompt.", "vllm", "--limit-mm-per-prompt"),
        ("Image count 16 exceeds limit 4 per request", "sglang", "--limit-mm-data-per-request"),
        ("image input is not supported - hint: you may need to provide the mmproj", "llamacpp", "--mmproj"),
        ("No endpoints found that support image input", "", "takes no pictures"),
        ("This model's maximum context length is 4096 tokens", "vllm", "--max-model-len"),
        ("the request exceeds the available context size", "llamacpp", "-c (shared"),
        ("Requested sample logprobs of 20, which is greater than max allowed: 5", "vllm", "--max-logprobs 20"),
        ("default chat template is no longer allowed, provide a chat template", "vllm", "--chat-template"),
    ],
)
def test_the_true_reason_with_the_flag_of_that_server(words, kind, told):
    text = advice(words, kind)
    assert told in text
    assert kind != "llamacpp" or "vLLM" not in text


def test_a_field_of_the_chat_template_is_no_missing_template():
    assert advice("chat_template_kwargs: extra inputs are not permitted") == "" == advice("Bad Request")


def test_what_a_server_will_never_do():
    assert is_final("image input is not supported") and is_final("logprobs are not supported with streaming")
    assert not is_final("CUDA out of memory") and not is_final("Internal Server Error")


@pytest.mark.parametrize(
    "models, kind",
    [
        ({"data": [{"id": "m", "owned_by": "vllm"}]}, "vllm"), ({"data": [{"owned_by": "llamacpp"}]}, "llamacpp"),
        ({"data": [{"owned_by": "Qwen"}]}, ""), ({"data": []}, ""), ([], ""), ({"data": [3]}, ""),
    ],
)  # fmt: skip
def test_kinds_of_servers(models, kind):
    assert server_kind(models) == kind
