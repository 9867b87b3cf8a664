"""Weights and data on hosts without a way out: a folder there, and what happens to a benchmark that finds none."""

from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.outing import NULL, Fleet, said
from tests.unit.harness.benchmarks import articles

pytestmark = pytest.mark.lab

NAME = "llama3.1-8b-edge"
FOLDER = "/home/bench/llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a user brings of Llama: the tokenizer and the rest, in the forms that are published."""
    made = tmp_path / "llama"
    made.mkdir()
    articles.byte_tokenizer(128_256, 128_009, begin=128_000).save(str(made / "tokenizer.json"))
    entries = [{"input": f"It rains for the {number}th day.", "output": "Rain ."} for number in range(5_000)]
    articles.write_articles(made / "sample_cnn_eval_5000.json", entries)
    articles.splitter_archive(made / "punkt_tab.zip")
    return made


def bring(lab: Lab, host: str, folder: Path) -> None:
    lab.run(["scp", "-q", "-r", "-F", str(lab.ssh_config), str(folder), f"bench@{host}:{FOLDER}"], check=True)


def test_a_benchmark_whose_files_are_missing_holds_back_neither_host_nor_fleet(
    lab: Lab, tmp_path: Path, folder: Path
) -> None:
    fleet = Fleet(
        lab,
        tmp_path,
        benchmarks=[*NULL, {"name": NAME, "backend": "null", "scenarios": ["Offline"]}],
        hosts=[{"name": "h[01-02]", "kind": "server", "user": "bench"}],
        role_variables={
            "python_env_find_links": "/opt/wheelhouse",
            "python_env_no_index": True,
            "assets_folders": {NAME: FOLDER},
        },
    )
    bring(lab, "h01", folder)
    done = fleet("provision")
    assert done.returncode == 0
    cause = f"{FOLDER}: no such folder on this host; the role variable assets_folders names it"
    said(done, "2 of 2 hosts ready", "cannot run llama3.1-8b-edge:")
    one, two = fleet.read("provision", "readiness.json")["hosts"]
    assert (one["cannot"], two["cannot"]) == ({}, {NAME: cause})
    assert (one["state"], two["state"], two["cause"]) == ("ready", "ready", "")
    there = "ls -l /home/bench/.mlperf-fleet/assets/llama3.1-8b-edge/source"
    assert lab["h01"].sh(there).count(f"-> {FOLDER}/") == 3

    # Half of it comes: what the folder lacks is asked of its address, which no lab host can reach.
    (folder / "punkt_tab.zip").unlink()
    bring(lab, "h02", folder)
    fleet("provision", "--session", fleet.session.name)
    (reason,) = fleet.read("provision", "readiness.json")["hosts"][1]["cannot"].values()
    assert reason.startswith("https://raw.githubusercontent.com/nltk/nltk_data/")

    articles.splitter_archive(folder / "punkt_tab.zip")
    lab["h02"].sh(f"rm -r {FOLDER}")
    bring(lab, "h02", folder)
    assert fleet("provision", "--session", fleet.session.name).returncode == 0
    assert [host["cannot"] for host in fleet.read("provision", "readiness.json")["hosts"]] == [{}, {}]
    again = fleet("provision", "--session", fleet.session.name)
    assert [host["changed"] for host in fleet.read("provision", "readiness.json")["hosts"]] == [0, 0]
    assert "cannot" not in again.stdout


def test_a_host_whose_only_benchmark_finds_no_files_has_failed(lab: Lab, tmp_path: Path) -> None:
    fleet = Fleet(
        lab,
        tmp_path,
        benchmarks=[{"name": "llama3.1-8b", "backend": "null", "scenarios": ["Offline"]}],
        hosts=[{"name": "h03", "kind": "server", "user": "bench"}],
    )
    done = fleet("provision")
    assert done.returncode == 3
    said(done, "0 of 1 hosts ready", "h03", "failed", "https://inference.mlcommons-storage.org/metadata/")
