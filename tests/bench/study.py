"""The study on real text: how much of the gain survives privacy, over several seeds.

Runs real federations (`foedus demo --data`, one process for each party) on the files of `--data`, with and without
privacy, and prints the figures that `docs/benchmarks.md` quotes: held-out loss before and after, the gain, the share
of the gain without privacy that is kept with it, as means over seeds with their spread, and the longest run's seconds.

In private runs nothing takes a seed (sampling and noise come from the operating system), so there "a seed" is a
repetition with another split key; without privacy it seeds every draw.

    make study DATA=../shared/data STUDY_FLAGS="--seeds 0 1 2 --out study.json"

Finished runs are kept in `--out` as they end, and are not repeated when the command is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

UNITS = {"medical": ["topic", "pubmedqa_train=id"], "legal": ["case"]}


def run_demo(data: Path, domain: str, *, seed: int, private: bool, rounds: int, epsilon: float) -> dict[str, Any]:
    """One federation over all files of `data/domain`; its JSON result."""
    with tempfile.TemporaryDirectory(prefix="foedus-study-") as folder:
        command = [sys.executable, "-m", "foedus_protocols.cli", "demo", "--data", str(data / domain)]
        for unit in UNITS[domain]:
            command += ["--unit", unit]
        command += ["--rounds", str(rounds), "--epsilon", str(epsilon), "--seed", str(seed), "--format", "json"]
        command += ["--folder", str(Path(folder) / "demo"), "--evaluate-every", str(rounds)]
        if not private:
            command.append("--no-privacy")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: the run for {domain}, seed {seed} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def spread(values: list[float]) -> str:
    """Mean and, with several values, the standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def summarise(runs: list[dict[str, Any]]) -> str:
    """A Markdown table with one row a domain and mode."""
    rows = [
        "| domain | mode | seeds | epsilon | loss before | loss after | gain (nats) | fall | share kept | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for domain in UNITS:
        free = [run for run in runs if run["domain"] == domain and not run["private"]]
        for private in (False, True):
            chosen = [run for run in runs if run["domain"] == domain and run["private"] is private]
            if not chosen:
                continue
            before = [run["loss_before"] for run in chosen]
            after = [run["loss_after"] for run in chosen]
            gain = [b - a for b, a in zip(before, after, strict=True)]
            fall = statistics.fmean(g / b for g, b in zip(gain, before, strict=True))
            kept = "-"
            if private and free:
                base = statistics.fmean(run["loss_before"] - run["loss_after"] for run in free)
                kept = f"{statistics.fmean(gain) / base:.0%} ({min(gain) / base:.0%} to {max(gain) / base:.0%})"
            epsilon = f"{max(run['epsilon'] for run in chosen):.3f}" if private else "-"
            rows.append(
                f"| {domain} | {'private' if private else 'none'} | {len(chosen)} | {epsilon} | {spread(before)} "
                f"| {spread(after)} | {spread(gain)} | {fall:.1%} | {kept} "
                f"| {max(run['seconds'] for run in chosen):.0f} at most |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run what is missing in `--out`, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with medical/ and legal/")
    parser.add_argument("--domains", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("study.json"))
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for seed in arguments.seeds:
        for domain in arguments.domains:
            for private in (False, True):
                key = {"domain": domain, "seed": seed, "private": private, "rounds": arguments.rounds}
                if any(all(run[name] == value for name, value in key.items()) for run in runs):
                    continue
                result = run_demo(
                    arguments.data,
                    domain,
                    seed=seed,
                    private=private,
                    rounds=arguments.rounds,
                    epsilon=arguments.epsilon,
                )
                runs.append(result | key)
                arguments.out.write_text(json.dumps(runs, indent=1))
                print(
                    f"{key} loss {result['loss_before']:.4f} -> {result['loss_after']:.4f}, {result['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    print(summarise(runs))


if __name__ == "__main__":
    main()
