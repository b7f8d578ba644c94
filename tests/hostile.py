"""A run whose names, prompts and completions try to break a page."""

import json

from run_folders import write_run

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "<img src=x onerror=alert(2)>", "{{data}}", "&lt;"]
HOSTILE += ["\u2028", "\u202e", "\x00", "'\"`", "<style>*{display:none}</style>", "]]>", "${1}"]


def hostile_run(folder):
    """A run in which everything that can be text is an attack."""
    words = ["a", "b", *HOSTILE, "<eos>"]
    prompt = "".join(HOSTILE).replace("\x00", "")
    run = write_run(
        folder, [f"task.system_prompt={json.dumps(prompt[:60])}"], words=words, prompt="".join(HOSTILE)
    )
    log = (run / "environment.json").read_text()
    (run / "environment.json").write_text(
        log.replace('"device": null', f'"device": {json.dumps(HOSTILE[0])}')
    )
    return run
