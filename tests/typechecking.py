"beartype as jaxtyping uses it for the whole test run; an int is accepted where a float is asked for."
from beartype import BeartypeConf, beartype
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
