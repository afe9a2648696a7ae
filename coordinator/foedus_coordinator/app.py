"""The coordinator's Flower app: it binds a run to a `ServerApp` and does nothing else. `rounds.py` is the run."""

from __future__ import annotations

from foedus_coordinator.grid import LinkGrid
from foedus_coordinator.rounds import execute
from foedus_coordinator.run import Run

# After `grid`, which turns Flower's telemetry off before the first import.
from flwr.app import Context, RecordDict  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip


def server_app(run: Run) -> ServerApp:
    """A `ServerApp` whose main function is this run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        execute(run)

    return app


def start(run: Run, grid: LinkGrid) -> None:
    """Call the app as Flower would."""
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server_app(run)(grid, context)
