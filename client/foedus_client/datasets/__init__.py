"""An organisation's text: files, shapes of rows, privacy units, token records."""

from foedus_client.datasets.harmony import Record
from foedus_client.datasets.load import Dataset, Report, Unit, load_dataset
from foedus_client.datasets.units import parse_columns, parse_units

__all__ = ["Dataset", "Record", "Report", "Unit", "load_dataset", "parse_columns", "parse_units"]
