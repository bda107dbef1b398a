"""Write `fdiv/cli/tables.json`, the rows of `fdiv methods` and `fdiv divergences`, from the classes."""

import json
from pathlib import Path

from fdiv.cli import listings

path = Path(listings.__file__).with_name("tables.json")
path.write_text(json.dumps(listings.computed_tables(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
