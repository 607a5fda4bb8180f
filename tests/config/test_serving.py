"""What is served, by one file: every key has its effect, and what is wrong is told with its line."""

import pytest

from ropewalk.config.serving import Embeddings, EngineOptions, Remote, ServedModel, read_serving
from ropewalk.errors import ConfigError
from ropewalk.tenants.prices import Price

WHOLE = """
engine: {memory_gb: 4, disk_gb: 50.5, int8_on_disk: true, threads: 2}
warm_at_upload: [answers]
preload: [answers, tuned]
fetch_urls: false
models:
  answers: {adapter: house}
  tuned: {adapter: runs/x/adapter, base: models/qwen, price: {input: 0.1, output: 1, currency: EUR, as_of: 2026-11-22}}
  big: {remote: openai, url: "http://gpu:8000", model: qwen3-30b, key_env: UPSTREAM_KEY, longest: 32768}
"""


def read(tmp_path, text):
    (tmp_path / "models.yml").write_text(text)
    return read_serving(tmp_path / "models.yml")


def test_a_whole_file_is_read(tmp_path):
    found = read(tmp_path, WHOLE)
    assert found.engine == EngineOptions(4.0, 50.5, True, threads=2)
    assert (found.warm_at_upload, found.preload, found.fetch_urls) == (("answers",), ("answers", "tuned"), False)
    assert found.models == {
        "answers": ServedModel(adapter="house"),
        "tuned": ServedModel("models/qwen", "runs/x/adapter", None, Price(0.1, 1.0, currency="EUR", as_of="2026-11-22")),
        "big": ServedModel(remote=Remote("openai", "http://gpu:8000", "qwen3-30b", "UPSTREAM_KEY", 32768)),
    }
    assert found.folder == tmp_path
    assert found.price("tuned") == Price(0.1, 1.0, currency="EUR", as_of="2026-11-22")


def test_embeddings_are_of_this_machine_or_of_another_server(tmp_path):
    assert read(tmp_path, "preload: []").embeddings is None
    here = read(tmp_path, "embeddings: {base: e5, query: 'query: ', passage: 'passage: ', pooling: mean, threads: 2}")
    assert here.embeddings == Embeddings("e5", None, "query: ", "passage: ", "mean", 2)
    there = read(tmp_path, "embeddings: {remote: openai, url: 'http://gpu:8001', model: bge, key_env: KEY, query: q}")
    assert there.embeddings == Embeddings(remote=Remote("openai", "http://gpu:8001", "bge", "KEY"), query="q")


def test_without_models_the_registry_is_served(tmp_path):
    assert read(tmp_path, "preload: [x]\n").models is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: {}", r"models.yml:1: unknown key 'modles'; did you mean 'models'\?"),
        ("models:\n  a: {bas: x}", r":2: unknown key 'bas'; did you mean 'base'\?"),
        ("models:\n  a: {price: {input: 1}}", ":2: 'a' is served by nothing; name a base, an adapter, or a remote"),
        ("models:\n  a: {base: x, remote: openai, url: 'http://x'}", "'a' is served by base and remote"),
        ("models:\n  a: {remote: openai}", ":2: a has no url, which it needs"),
        ("models:\n  a: {remote: openai, url: x}", "url 'x' is no address"),
        ("models:\n  a: {remote: openai, url: 'http://u:p@x'}", "url holds a user, a query or a fragment"),
        ("models:\n  a:\n    remote: soap\n    url: 'http://x'", ":3: remote is 'soap'; expected anthropic or openai"),
        ("models:\n  a: {remote: openai, url: 'http://x', key: sk-1}", r"unknown key 'key'; did you mean 'key_env'\?"),
        ("models:\n  a: {remote: openai, url: 'http://x', key_env: sk-1}", "key_env is no name of an environment variable"),
        ("models:\n  a: {remote: openai, url: 'http://x', longest: many}", "longest is 'many'; expected a whole number"),
        ("models:\n  a: {remote: anthropic, url: 'http://x', files: all}", "files is 'all'; expected inline or upload"),
        ("models:\n  a: {remote: openai, url: 'http://x', files: upload}", "files: upload needs remote: anthropic"),
        ("models:\n  a: {base: x, url: 'http://x'}", "unknown key 'url'"),
        ("models:\n  a: {base: x, price: {cached: 1}}", "unknown key 'cached'; did you mean 'cache_read'"),
        ("models:\n  a: {base: x, price: {input: -1}}", "input is -1.0; expected 0 or more, for a million tokens"),
        ("models:\n  a: {base: x, price: {input: .inf}}", "input is inf; expected 0 or more"),
        ("models:\n  a: {base: x, price: {currency: $}}", r"currency is '\$'; expected three letters, such as USD"),
        ("models:\n  a:\n    base: x\n    price:\n      as_of: May", ":5: as_of is 'May'; expected a day, such as 2026-11-22"),
        ("models:\n  a: {base: x}\npreload: [b]", ":3: preload names 'b', which is not served; known: a"),
        ("models: {}", "no model is named"),
        ("embeddings: {bas: x}", r":1: unknown key 'bas'; did you mean 'base'\?"),
        ("embeddings: {query: x}", "embeddings need one of a base of this machine, or a remote"),
        ("embeddings: {base: x, pooling: max}", "pooling is 'max'; expected mean, cls or last"),
        ("embeddings: {base: x, threads: -1}", "threads is -1; expected 0 or more"),
        ("embeddings: {base: x, url: 'http://x'}", "unknown key 'url'"),
        ("embeddings: {remote: anthropic, url: 'http://x', model: y}", "expected openai, whose /v1/embeddings is asked"),
        ("embeddings: {remote: openai, url: 'http://x'}", "embeddings of a remote need the name of its model"),
        ("embeddings: {remote: openai, url: x, model: y}", "url 'x' is no address"),
        ("engine: {memory_gb: lots}", "memory_gb is 'lots'; expected a number"),
        ("engine: {running: 0}", "running is 0; expected 1 or more"),
        ("engine: {disk_gb: -1}", r"disk_gb is -1.0; expected 0 or more"),
        ("engine: {threads: 1.5}", "threads is 1.5; expected a whole number"),
        ("engine: {int8_on_disk: 1}", "int8_on_disk is 1; expected true or false"),
        ("fetch_urls: maybe", "fetch_urls is 'maybe'; expected true or false"),
        ("warm_at_upload: answers", "expected a list of names"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
