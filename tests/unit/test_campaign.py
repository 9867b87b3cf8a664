"""fleet.yml: what is accepted, and that every refusal names the file, the key and the fix."""

from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from fleet import campaign
from fleet.campaign import BenchmarkEntry, HostEntry
from fleet.errors import CampaignError, ExitCode
from fleet.terms import Category, Division, HostKind, Mode, Scenario
from tests.unit.fakes import MINIMAL


def refusal(text: str) -> str:
    """What load_text says about a campaign that it must refuse."""
    with pytest.raises(CampaignError) as caught:
        campaign.load_text(text, "my/fleet.yml")
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    assert "my/fleet.yml" in caught.value.message
    return caught.value.message


def test_a_minimal_campaign_gets_the_documented_defaults() -> None:
    found = campaign.load_text(MINIMAL, "fleet.yml")
    assert (found.submitter, found.division, found.category) == ("ExampleLab", Division.OPEN, Category.EDGE)
    assert (found.round, found.work_dir, found.version) == ("v6.1", "~/.mlperf-fleet", 1)
    (benchmark,) = found.benchmarks
    assert benchmark.backend == "pytorch"
    assert benchmark.scenarios == (Scenario.SINGLE_STREAM, Scenario.OFFLINE)
    assert benchmark.modes == (Mode.ACCURACY, Mode.PERFORMANCE)
    (host,) = found.hosts
    assert (host.name, host.kind, host.connection) == ("h01", HostKind.SERVER, "ssh")
    assert found.run.lost_after_s == 25


@pytest.mark.parametrize(
    ("text", "where", "suggestion"),
    [
        (MINIMAL + "submiter: x\n", "submiter", "submitter"),
        (MINIMAL.replace("{name: tiny-bert}", "{name: tiny-bert, bakend: 'null'}"), "benchmarks.0.bakend", "backend"),
        (MINIMAL.replace("kind: server", "kind: server, adress: x"), "hosts.0.adress", "address"),
        (MINIMAL + "run: {lost_after: 9}\n", "run.lost_after", "lost_after_s"),
        (
            MINIMAL.replace("{name: tiny-bert}", "{name: tiny-bert, user_conf: {Offline: {target_qp: 9}}}"),
            "benchmarks.0.user_conf.Offline.target_qp",
            "target_qps",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, where: str, suggestion: str) -> None:
    assert f"{where}: unknown key, did you mean {suggestion!r}?" in refusal(text)


def test_every_wrong_key_is_named_at_once() -> None:
    said = refusal(MINIMAL.replace("kind: server", "kind: sever").replace("submitter", "submiter"))
    assert "submitter: missing" in said
    assert "submiter: unknown key" in said
    assert "hosts.0.kind" in said
    assert all(line.startswith("my/fleet.yml: ") for line in said.splitlines())


@pytest.mark.parametrize("key", ["submitter", "benchmarks", "hosts"])
def test_a_missing_key_is_named(key: str) -> None:
    data = yaml.safe_load(MINIMAL)
    del data[key]
    assert f"{key}: missing" in refusal(yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "submitter: Other\n", "my/fleet.yml:4: key 'submitter' is given twice"),
        (MINIMAL.replace("kind: server", "kind: server, kind: laptop"), "my/fleet.yml:3: key 'kind' is given twice"),
        (MINIMAL.replace("[{name: tiny-bert}]", "[{name: tiny-bert}, {name: tiny-bert}]"), "tiny-bert is listed twice"),
        (MINIMAL + "round: v1.0\n", "unknown round 'v1.0'; known: v6.1"),
        (MINIMAL.replace("tiny-bert", "tiny-brt"), "unknown benchmark 'tiny-brt', did you mean 'tiny-bert'?"),
        (MINIMAL + "role_variables: {python_env_idx_url: x}\n", "did you mean 'python_env_index_url'?"),
        (MINIMAL + "division: closed\n", "tiny-bert cannot be run in the closed division"),
        (
            MINIMAL.replace("name: h01", "name: h01, file: hosts.txt"),
            "exactly one of name, file, ssh_config and ec2_tag",
        ),
        (MINIMAL.replace("name: h01, ", ""), "exactly one of name, file, ssh_config and ec2_tag"),
        (MINIMAL.replace("name: h01", "name: h01, port: 70000"), "hosts.0.port"),
        (MINIMAL.replace("name: h01", "name: h01, user_conf: {bert: {}}"), "'bert', which is not under benchmarks"),
        (MINIMAL + "work_dir: ../there\n", "work_dir"),
        (MINIMAL + "schema: 2\n", "schema"),
        (MINIMAL + "run: {lost_after_s: 1}\n", "run.lost_after_s"),
        ("- one\n- two\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("submitter: [\n", "my/fleet.yml:2"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_bare_null_is_the_null_backend() -> None:
    found = campaign.load_text(MINIMAL.replace("{name: tiny-bert}", "{name: tiny-bert, backend: null}"), "fleet.yml")
    assert found.benchmarks[0].backend == "null"
    assert "backend" in refusal(MINIMAL.replace("{name: tiny-bert}", "{name: tiny-bert, backend: cuda}"))


def test_a_missing_file_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="no such file") as caught:
        campaign.load(tmp_path / "fleet.yml")
    assert caught.value.exit_code == 2
    assert caught.value.hint == "fleet init"
    (tmp_path / "latin.yml").write_bytes(b"submitter: caf\xe9\n")
    with pytest.raises(CampaignError, match="cannot be read"):
        campaign.load(tmp_path / "latin.yml")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu[01-03].lab", ["gpu01.lab", "gpu02.lab", "gpu03.lab"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[1-2,7]", ["gpu1", "gpu2", "gpu7"]),
        ("192.168.0.7", ["192.168.0.7"]),
        ("one", ["one"]),
    ],
)
def test_ranges_expand_in_order_with_their_padding(text: str, names: list[str]) -> None:
    assert campaign.expand(text, source="fleet.yml") == names


@pytest.mark.parametrize("text", ["gpu[01-", "gpu[3-1]", "gpu[a-b]"])
def test_a_bad_range_is_refused_by_name(text: str) -> None:
    with pytest.raises(CampaignError) as caught:
        campaign.expand(text, source="hosts.txt")
    assert caught.value.message.startswith("hosts.txt: host range ")
    assert text in caught.value.message


def test_a_range_of_one_expands() -> None:
    assert campaign.expand("gpu[05-05].lab", source="fleet.yml") == ["gpu05.lab"]


def test_a_range_too_wide_is_refused() -> None:
    with pytest.raises(CampaignError, match="more than 10000 hosts"):
        campaign.expand("gpu[1-10001]", source="fleet.yml")
    assert len(campaign.expand("gpu[1-10000]", source="fleet.yml")) == 10_000


def test_a_range_too_wide_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "NodeSet", lambda *_, **__: pytest.fail("the range was opened"))
    with pytest.raises(CampaignError, match="more than 10000 hosts"):
        campaign.expand("gpu[0-999999999]", source="fleet.yml")


def test_merge_keys_are_yaml_too() -> None:
    text = MINIMAL.replace("hosts:", "hosts: [&one {name: h00, kind: laptop}, {<<: *one, name: h01}]\nx:").partition(
        "x:"
    )
    assert len(campaign.load_text(text[0], "fleet.yml").hosts) == 2


def test_a_list_as_key_is_refused() -> None:
    refusal(MINIMAL + "? [a, b]\n: 1\n")


def test_an_impossible_date_is_refused() -> None:
    refusal(MINIMAL.replace("ExampleLab", "2024-13-45"))


@pytest.mark.parametrize("name", ["Example Lab", "'Lab '", "' Lab'", "a/b", ".hidden"])
def test_a_submitter_that_is_no_plain_folder_is_refused(name: str) -> None:
    assert "submitter" in refusal(MINIMAL.replace("ExampleLab", name))


@pytest.mark.parametrize("name", ["python_env_index_url", "python_env_extra_index_url", "python_env_torch_index_url"])
@pytest.mark.parametrize("who", ["me:hunter2", "hunter2"])
def test_a_password_in_a_role_variable_is_refused_and_not_repeated(name: str, who: str) -> None:
    said = refusal(MINIMAL + f"role_variables: {{{name}: 'https://{who}@pypi.lab/simple'}}\n")
    assert f"{name} holds a password" in said
    assert "hunter2" not in said
    plain = campaign.load_text(MINIMAL + f"role_variables: {{{name}: 'https://pypi.lab/a@b'}}\n", "fleet.yml")
    assert plain.role_variables == {name: "https://pypi.lab/a@b"}


@pytest.mark.parametrize("reason", ["cancelled", "host-key"])
def test_what_is_never_tried_again_has_no_policy(reason: str) -> None:
    said = refusal(MINIMAL + f"run: {{retry: {{other: {{times: 1}}, {reason}: {{times: 1}}}}}}\n")
    assert f"run.retry: {reason} is never tried again: " in said


@pytest.mark.parametrize("key", ["scenarios: [Offline, Offline]", "modes: [accuracy, accuracy]"])
def test_a_scenario_or_mode_listed_twice_is_refused(key: str) -> None:
    refusal(MINIMAL.replace("name: tiny-bert", f"name: tiny-bert, {key}"))


def test_the_schema_is_valid_and_agrees_with_the_reader() -> None:
    schema = campaign.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(yaml.safe_load(MINIMAL)))
    assert list(validator.iter_errors(yaml.safe_load(MINIMAL + "submiter: x\n")))
    assert "schema" in schema["properties"]


def test_a_hosts_own_loadgen_settings_win_key_by_key() -> None:
    benchmark = BenchmarkEntry.model_validate(
        {"name": "tiny-bert", "user_conf": {"Offline": {"target_qps": 10, "min_duration": 1000}}}
    )
    host = HostEntry.model_validate(
        {"name": "a", "kind": "server", "user_conf": {"tiny-bert": {"Offline": {"target_qps": 99}}}}
    )
    assert campaign.user_conf(host, benchmark, Scenario.OFFLINE) == {"target_qps": 99.0, "min_duration": 1000}
    assert campaign.user_conf(host, benchmark, Scenario.SINGLE_STREAM) == {}


@pytest.mark.parametrize("name", ["example", "local"])
def test_the_templates_of_init_are_campaigns(name: str) -> None:
    text = resources.files("fleet.cli").joinpath("templates", f"{name}.yml").read_text(encoding="utf-8")
    found = campaign.load_text(text.replace("THIS_HOST", "my-laptop").replace("YOUR_USER", "me"), name)
    assert found.benchmarks[0].name == "tiny-bert"
    assert found.hosts[0].connection == ("local" if name == "local" else "ssh")


def test_the_example_of_instances_names_its_hosts() -> None:
    found = campaign.load(Path(__file__).parents[2] / "inventories" / "ec2.yml")
    assert found.cloud is not None
    assert [name for name, _ in found.cloud.hosts()] == ["g5-1", "g5-2", "cheap-1"]
    assert found.cloud.instances[1].market == "spot-then-on-demand"
    commented = Path(__file__).parents[2].joinpath("inventories", "ec2.yml").read_text(encoding="utf-8").splitlines()
    start = commented.index("# hosts:")
    text = "\n".join([*commented[:start], *(line.removeprefix("# ") for line in commented[start:])])
    assert campaign.load_text(text, "ec2.yml").hosts[0].ec2_tag == {"Project": "bench"}


def test_what_is_commented_out_in_the_template_is_a_campaign_too() -> None:
    lines = resources.files("fleet.cli").joinpath("templates", "example.yml").read_text(encoding="utf-8").splitlines()
    start = lines.index("# cloud:")
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("#"))
    section = [line.removeprefix("# ") for line in lines[start:end]]
    text = "\n".join([line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in section])
    text = text.replace("      zones: [us-east-1a]", "      zones: [us-east-1a]\n      regions: [us-east-1]")
    found = campaign.load_text(MINIMAL + text + "\n", "example.yml").cloud
    assert found is not None
    assert (found.max_cost, found.user, found.address) == (25, "ubuntu", "auto")
    assert found.results is not None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{ec2_tag: {}, kind: ec2}", "ec2_tag"),
        ("{ec2_tag: {a: b}, kind: server}", "ec2_tag: such hosts are of kind ec2"),
        ("{ec2_tag: {a: b}, kind: ec2, connection: local}", "over ssh"),
        ("{ec2_tag: {a: b}, kind: ec2, address: 10.0.0.1}", "public, private or id"),
        ("{ec2_tag: {a: b}, name: h, kind: ec2}", "exactly one of"),
        ("{ec2_tag: {a: b}, kind: ec2, region: here}", "region"),
        ("{name: h, region: us-east-1, kind: ec2}", "region: only with ec2_tag"),
    ],
)
def test_what_is_wrong_with_instances_by_tag_is_said(entry: str, said: str) -> None:
    assert said in refusal(MINIMAL.replace("{name: h01, kind: server}", entry))


def test_the_schema_knows_what_the_reader_knows_of_instances() -> None:
    validator = jsonschema.Draft202012Validator(campaign.schema())
    text = MINIMAL.replace("{name: h01, kind: server}", "{ec2_tag: {a: b}, region: us-east-1, kind: ec2, address: id}")
    data = yaml.safe_load(text + "cloud: {max_cost: 5, instances: [{name: g5, types: [g5.xlarge]}], python: /p}\n")
    validator.validate(data)
    assert campaign.load_text(yaml.safe_dump(data), "fleet.yml").hosts[0].region == "us-east-1"
    for section, key, value in (("cloud", "max_cost", 0), ("cloud", "adress", "x"), ("cloud", "instances", [])):
        wrong = {**data, section: {**data[section], key: value}}
        assert not validator.is_valid(wrong)
        refusal(yaml.safe_dump(wrong))
