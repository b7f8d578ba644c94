"""The run-time type checker of the tests: beartype, with an int accepted as a float as in PEP 484."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
