"""The assets role in real plays over this machine: what comes from a folder, and what a missing one costs."""

import sys
import tarfile
from pathlib import Path

import pytest

from fleet import handoff, provision
from fleet.plays import AnsiblePlays
from fleet.terms import HostState
from tests.unit.fakes import RecordingWatch, Scene, scene
from tests.unit.harness.benchmarks import articles

pytestmark = pytest.mark.slow

CAMPAIGN = """
submitter: ExampleLab
benchmarks:
  - {name: llama3.1-8b-edge, backend: 'null', scenarios: [Offline]}
  - {name: tiny-bert, backend: 'null', scenarios: [Offline]}
hosts: [{name: here, kind: server, connection: local, python: PYTHON}]
work_dir: WORK
role_variables:
  assets_folders: {llama3.1-8b-edge: FOLDER}
"""


def converged_but_for_assets(tmp_path: Path) -> Scene:
    """This machine with this environment and this harness, as provision leaves them."""
    words = {"PYTHON": sys.executable, "WORK": str(tmp_path / "work"), "FOLDER": str(tmp_path / "llama")}
    text = CAMPAIGN
    for word, value in words.items():
        text = text.replace(word, value)
    made = scene(tmp_path, text)
    for (
        path
    ) in made.session.inventory.iterdir():  # the scene's hosts have Debian's Python, this environment has its own
        path.write_text(path.read_text("utf-8").replace("/usr/bin/python3", sys.executable), encoding="utf-8")
    given = provision.variables(made.session, made.campaign, describe=True)
    work = tmp_path / "work"
    for folder, link, digest in (
        ("venvs", work / "venv", given["python_env_digest"]),
        ("harness", work / "harness" / "current", given["harness_digest"]),
    ):
        (work / folder).mkdir(parents=True)
        link.symlink_to(work / folder / digest)
    (work / "venvs" / given["python_env_digest"]).symlink_to(sys.prefix)
    with tarfile.open(given["harness_archive"]) as archive:
        archive.extractall(work / "harness" / given["harness_digest"], filter="data")
    return made


def write_folder(folder: Path) -> None:
    """What a user brings of Llama, in the forms that are published."""
    folder.mkdir()
    articles.byte_tokenizer(128_256, 128_009, begin=128_000).save(str(folder / "tokenizer.json"))
    entries = [{"input": f"It rains for the {number}th day.", "output": "Rain ."} for number in range(5_000)]
    articles.write_articles(folder / "sample_cnn_eval_5000.json", entries)
    articles.splitter_archive(folder / "punkt_tab.zip")


def provisioned(made: Scene) -> handoff.Readiness:
    (found,) = provision.provision(made.session, made.campaign, AnsiblePlays(), RecordingWatch())
    return found


def test_a_folder_that_is_missing_costs_its_benchmark_and_one_that_comes_mends_it(tmp_path: Path) -> None:
    made = converged_but_for_assets(tmp_path)
    found = provisioned(made)
    assert (found.state, found.cause) == (HostState.READY, "")
    assert found.cannot == {
        "llama3.1-8b-edge": f"{tmp_path}/llama: no such folder on this host; the role variable assets_folders names it"
    }
    assets = tmp_path / "work" / "assets"
    assert [path.parent.name for path in assets.glob("*/.complete")] == ["tiny-bert"]

    write_folder(tmp_path / "llama")
    found = provisioned(made)
    assert (found.state, found.cannot) == (HostState.READY, {})
    links = list((assets / "llama3.1-8b-edge" / "source").iterdir())
    assert {link.readlink() for link in links} == set((tmp_path / "llama").iterdir())

    # Converged: nothing is played any more.
    assert provisioned(made).changed == 0


def test_a_folder_that_is_damaged_is_named_in_the_harness_s_words(tmp_path: Path) -> None:
    made = converged_but_for_assets(tmp_path)
    write_folder(tmp_path / "llama")
    path = tmp_path / "llama" / "sample_cnn_eval_5000.json"
    path.write_bytes(path.read_bytes()[:-100])
    reason = provisioned(made).cannot["llama3.1-8b-edge"]
    assert "sample_cnn_eval_5000.json: not whole JSON, fetch it again" in reason
