"""Columns of real tables for the charts: files of the vega_datasets package, training and held-out."""

import csv
import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """One numeric column of a table file and the unit that makes its values two-digit numbers.

    Attributes:
        table: file inside vega_datasets' data folder.
        field: name of the column.
        scale: the value is multiplied by this before it is rounded (a change of unit).
    """

    table: str
    field: str
    scale: float = 1.0


TRAIN_COLUMNS = (
    Column("barley.json", "yield"),  # bushels per acre
    Column("cars.json", "Miles_per_Gallon"),
    Column("cars.json", "Weight_in_lbs", 0.01),  # hundreds of pounds
    Column("cars.json", "Horsepower", 0.5),
    Column("iris.json", "sepalLength", 10),  # mm
    Column("iris.json", "petalLength", 10),
    Column("driving.json", "miles", 0.01),  # hundreds of miles per head and year
    Column("seattle-weather.csv", "temp_max"),  # degrees Celsius
    Column("us-employment.csv", "private", 0.0005),
    Column("us-employment.csv", "manufacturing", 0.005),
    Column("stocks.csv", "price"),  # dollars
    Column("airports.csv", "latitude"),  # degrees north
)
HELDOUT_COLUMNS = (
    Column("sf-temps.csv", "temp"),  # degrees Fahrenheit
    Column("la-riots.csv", "age"),  # years
    Column("wheat.json", "wheat"),  # shillings per quarter
    Column("seattle-temps.csv", "temp"),
    Column("iowa-electricity.csv", "net_generation", 0.002),
    Column("ohlc.json", "high"),
)


@functools.cache
def _rows(table: str) -> list[dict]:
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("vega_datasets is not installed; it brings the tables: pip install 'llava-comp[playground]'")
    path = Path(spec.submodule_search_locations[0]) / "_data" / table
    with open(path, encoding="utf-8", newline="") as file:
        return json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))


@functools.cache
def two_digit_values(column: Column) -> tuple[int, ...]:
    """The column's values in its unit, rounded; only those from 10 to 99, in the table's order."""
    values = []
    for row in _rows(column.table):
        cell = row.get(column.field)
        if cell in (None, ""):
            continue
        value = round(float(cell) * column.scale)
        if 10 <= value <= 99:
            values.append(value)
    return tuple(values)
