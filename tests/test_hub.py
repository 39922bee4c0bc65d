"""Names of a model hub: a server on this machine stands for it, with the paths that the hub's own library asks for."""

import hashlib
import http.server
import json
import sys
import threading
import types

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from rear_jax import jobs
from rear_jax.artifacts import published
from rear_jax.config import downloads, ranges
from rear_jax.errors import RearError
from rear_jax.weights import hub, shards
from tests import toy

COMMIT, OLD = "1" * 40, "2" * 40
TENSORS = {f"layer.{n}.weight": np.full((2, 3), n, np.float32) for n in range(3)}


class Hub(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of /<repo>/resolve/<revision>/<path>, and the list of files under /api/models/<repo>/tree/."""

    repos: dict[str, dict[str, bytes]]  # 'owner/repo' -> path -> content
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.partition("?")[0].removeprefix("/")
        self.asked.append(path)
        is_list = path.startswith("api/models/")
        owner, repo, _, revision, *rest = path.removeprefix("api/models/").split("/")
        files = self.repos.get(f"{owner}/{repo}")
        if files is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in ("main", COMMIT, OLD):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if is_list:
            listed = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return self.reply(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, body)
        if (content := files.get("/".join(rest))) is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        etag = hashlib.sha256(content).hexdigest()
        commit = OLD if revision == OLD else COMMIT
        return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)

    def reply(self, status, content, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def network(folder):
    """A hub's folder with two shards, their index and what lies beside them."""
    weight_map = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(TENSORS)}
    for name in set(weight_map.values()):
        save_file({key: TENSORS[key] for key in TENSORS if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub with a repository of one file, and one of shards in two folders; its cache is empty."""
    (tmp_path / "net").mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")
    sharded = network(tmp_path / "net")
    Hub.asked, Hub.repos = (
        [],
        {
            "owner/one": {
                "weights/one.safetensors": (tmp_path / "one.safetensors").read_bytes(),
                "README.md": b"# one",
            },
            "owner/net": sharded | {"pytorch_model.bin": b"the same", "inner/model.bin": b"x"},
            "owner/inner": {f"a/{name}": data for name, data in sharded.items()} | {"a/tf_model.h5": b"x"},
        },
    )
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{running.server_port}"  # as HF_ENDPOINT says, which the library reads when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))  # of retries
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.fetched.cache_clear()
    yield running
    running.shutdown()
    running.server_close()
    hub.fetched.cache_clear()


def offline(server):
    server.shutdown()
    server.server_close()
    hub.fetched.cache_clear()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://a/b/c.bin", ("a/b", None, "c.bin")),
        ("hf://a/b", ("a/b", None, "")),
        ("hf://a/b/", ("a/b", None, "")),
        ("hf://a-1/b.c_2@v1.0/d/e.pt", ("a-1/b.c_2", "v1.0", "d/e.pt")),
        ("hf://a/b@v1", ("a/b", "v1", "")),
        *(
            (name, None)
            for name in ("hf://a", "hf://a/b@/c", "hf://a/b/../c", "hf://../b/c", "hf://a/b//c", "a/b/c", "")
        ),
    ],
)
def test_names_have_one_form(name, parts):
    assert hub.parsed(name) == parts
    config = toy.config(init_from=name)
    if name.startswith("hf://") and parts is None:
        with pytest.raises(RearError, match=r"config\.init_from = .*: give a path, or hf://owner/repo/file"):
            ranges.checked(config)
    else:
        assert ranges.checked(config).init_from == name


def test_settings_that_name_no_weights_take_no_such_name():
    with pytest.raises(RearError, match=r"config\.codes_from = 'hf://a/b/c': give a path"):
        ranges.checked(toy.config(codes_from="hf://a/b/c"))


def test_a_file_is_fetched_once_and_kept(server):
    place = hub.fetched("hf://owner/one/weights/one.safetensors")
    np.testing.assert_array_equal(shards.open_weights(place)["layer.2.weight"], TENSORS["layer.2.weight"])
    asked = len(Hub.asked)
    assert hub.fetched("hf://owner/one/weights/one.safetensors") == place
    assert len(Hub.asked) == asked
    assert OLD in str(hub.fetched(f"hf://owner/one@{OLD}/weights/one.safetensors"))
    offline(server)
    assert hub.fetched("hf://owner/one/weights/one.safetensors") == place


@pytest.mark.parametrize(
    "name",
    ["hf://owner/net", "hf://owner/net/model.safetensors.index.json", "hf://owner/inner/a", "hf://owner/net@main"],
)
def test_shards_come_with_their_index(server, name):
    place = hub.fetched(name)
    found = shards.open_weights(place)
    assert {key: found[key].tolist() for key in found} == {key: value.tolist() for key, value in TENSORS.items()}
    unwanted = ("pytorch_model.bin", "tf_model.h5", "inner")
    assert not any(path.endswith(unwanted) for path in Hub.asked)
    if place.is_dir():
        assert published.weights_file(place) == place / "model.safetensors.index.json"
        offline(server)
        assert hub.fetched(name) == place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://owner/none/a.bin", "there is no owner/none: mend the name; if it is private, set HF_TOKEN."),
        ("hf://owner/none", "there is no owner/none: mend the name"),
        ("hf://owner/one/a.bin", "owner/one has no a.bin: mend the name."),
        ("hf://owner/one/folder", "owner/one has no folder: mend the name."),
        ("hf://owner/one@v9/weights/one.safetensors", "owner/one has no revision v9: mend it."),
        ("hf://owner/one@v9", "owner/one has no revision v9: mend it."),
        ("hf://owner", "hf://owner is no name of the hub: give hf://owner/repo/file"),
    ],
)
def test_what_is_not_there_is_one_line(server, name, message):
    with pytest.raises(RearError) as refused:
        hub.fetched(name)
    assert message in str(refused.value)


def test_without_a_network_and_without_a_copy_it_is_one_line(server):
    offline(server)
    for name in ("hf://owner/one/weights/one.safetensors", "hf://owner/net"):
        with pytest.raises(RearError, match=f"{name} cannot be fetched .*: connect, or download it elsewhere and name"):
            hub.fetched(name)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    hub.fetched.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RearError, match=r"pip install 'rear-jax\[hub\]', or name a file"):
        hub.fetched("hf://a/b/c.bin")


def test_every_setting_of_weights_is_fetched_and_no_other_is_touched(server):
    of_weights = [key for key, allowed in ranges.ALLOWED.items() if allowed.hub]
    assert {"init_from", "tokenizer_from", "lpips.vgg16", "text.encoder", "evaluate.inception"} <= set(of_weights)
    config = toy.config(**{key.replace(".", "__"): "hf://owner/one/weights/one.safetensors" for key in of_weights})
    found = dict(ranges.leaves(downloads.fetched(ranges.checked(config))))
    for key in of_weights:
        section, name = found[key]
        assert section[name].endswith("one.safetensors")
        assert "://" not in section[name]
    assert config.init_from.startswith("hf://")
    Hub.asked.clear()
    assert downloads.fetched(toy.config()).to_dict() == toy.config().to_dict()
    assert Hub.asked == []


def test_a_job_opens_what_a_setting_names(server, tmp_path):
    """A wrong network shows that the file was read; a missing one is named with its setting."""
    config = toy.config(tokenizer_from="hf://owner/one/weights/one.safetensors")
    with pytest.raises(RearError, match=r"one\.safetensors is no checkpoint of a network known here"):
        jobs.run_all(("tokenize",), config, tmp_path / "run")
    config.tokenizer_from = "hf://owner/one/other.bin"
    with pytest.raises(RearError, match=r"^config\.tokenizer_from: hf://owner/one/other\.bin: owner/one has no other"):
        jobs.run_all(("tokenize",), config, tmp_path / "run")
