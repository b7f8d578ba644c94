"""Tells a run's own metrics by their names, and keeps those that reward functions log apart from them."""

LOGGED = "logged"  # the group of what reward functions log under a name that is the run's own
_ALONE = ("step", "reward", "reward_std", "frac_reward_zero_std", "entropy", "learning_rate", "loss")
_ALONE += ("grad_norm", "kl")
_GROUPS = (
    "rewards",
    "answers",
    "completions",
    "tokens",
    "flops",
    "replay",
    "redraw",
    "curriculum",
    "optimizer",
    "sampling",
)
_GROUPS += ("time", "memory", "eval", LOGGED)


def is_own(name: str) -> bool:
    """Returns whether a name is, or may become, that of a metric of the run itself.

    >>> is_own("kl"), is_own("eval/accuracy"), is_own("length")
    (True, True, False)
    """
    group, slash, _ = name.partition("/")
    return group in _GROUPS if slash else name in _ALONE


def logged_name(name: str) -> str:
    """Returns the name of a metric that a reward function logs as `name`; two names stay two.

    >>> logged_name("length"), logged_name("kl")
    ('length', 'logged/kl')
    """
    return f"{LOGGED}/{name}" if is_own(name) else name
