"""fleet submission."""

from pathlib import Path

import click

from fleet import campaign as campaigns
from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode, SubmissionError
from fleet.mlperf import rules


@click.group(invoke_without_command=True)
@options.session_options
@options.json_option
@click.pass_context
def command(ctx: click.Context, session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Build one submission tree for all hosts, in the layout of the campaign's round. Needs no host.

    \b
    fleet submission            build it
    fleet submission check      name what would fail, before anyone uploads
    """  # noqa: D301 - click wants the character, not its name
    if ctx.invoked_subcommand:
        # Options may stand on either side of `check`.
        ctx.default_map = {"check": {"session_id": session_id, "base": base, "as_json": as_json}}
        return ExitCode.OK
    session = options.existing(base, session_id)
    with options.outing(session, session.campaign_file, quiet=as_json) as outing:
        try:
            built = pipeline.submission(outing)
        except SubmissionError as error:
            error.exit_code = ExitCode.worst([error.exit_code, tables.results_code(pipeline.read_results(outing))])
            raise
        found = pipeline.read_results(outing)
    if as_json:
        output.print_json(built, headline=found.headline)
    else:
        output.say(found.headline)
        for item in built.left:
            output.say(f"left out: {item.unit}: {item.reason}")
        output.show(f"submission: {built.root} ({len(built.systems)} systems, {built.performance_results} results)")
    return tables.results_code(found)


@command.command("check")
@options.session_options
@click.option("--official", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Your clone of mlcommons/inference: run its checker too.")  # fmt: skip
@options.json_option
def check_command(session_id: str | None, base: Path, official: Path | None, as_json: bool) -> ExitCode:
    """Name what would fail, before anyone uploads: paths, rules, seeds, durations, accuracy, descriptions.

    With --official, MLCommons' own checker is run as well and its rows are counted: an empty tree passes it.
    """
    from fleet.results.records import SessionResults
    from fleet.submission import check, select
    from fleet.submission import official as official_checker
    from fleet.submission.findings import has_errors

    session = options.existing(base, session_id)
    round_ = rules.load_round(campaigns.load(session.campaign_file).round)
    findings = list(check.check(session, round_))
    if official:
        # What should be in the tree, from the results; a result that never reached it must not go unnoticed.
        expected = len(
            select.select(session.read(session.results / "results.json", SessionResults), session.root).entries
        )
        verdict = official_checker.official(session.submission, official, round_, expected)
        findings += verdict.findings
        output.say(f"official checker: {verdict.rows} rows, {expected} performance results to submit")
    if as_json:
        output.print_json(findings)
    elif findings:
        rows = [[str(item.severity), str(item.path), item.message, item.fix] for item in findings]
        errors = sum(str(item.severity) == "error" for item in findings)
        title = f"{errors} errors, {len(findings) - errors} warnings in {session.submission}"
        output.print_table(title, ["severity", "path", "finding", "fix"], rows)
    else:
        output.show(f"nothing found that would fail in {session.submission}")
    return ExitCode.INVALID if has_errors(findings) else ExitCode.OK
