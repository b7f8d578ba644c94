"""The algorithms in words, and the papers that they are from: what a model card says of them."""

# Method -> its name and what it does, in words. The equations: docs/algorithms.md.
METHODS = {
    "t-spmo": (
        "T-SPMO",
        "a token gets credit where the completions of a prompt part: the mean reward of those that go on "
        "with it, less that of those that came so far",
    ),
    "s-grpo": (
        "S-GRPO",
        "a completion's reward, relative to those of its prompt, goes to a sample of its tokens",
    ),
    "grpo": ("GRPO", "a completion's reward, relative to those of its prompt, goes to all of its tokens"),
    "dr-grpo": (
        "Dr. GRPO",
        "a completion's reward less the mean of its prompt goes to all of its tokens, divided by the same "
        "number whatever its length",
    ),
    "rloo": (
        "RLOO",
        "a completion's reward less the mean of the other completions of its prompt goes to the whole of it",
    ),
    "lambda-grpo": (
        "lambda-GRPO",
        "a completion's reward, relative to those of its prompt, goes to all of its tokens; what several "
        "completions have in common counts once",
    ),
    "tempo": (
        "TEMPO",
        "a completion's reward, relative to those of its prompt, goes to all of its tokens, and where the "
        "completions part also the step in the mean reward that the token makes",
    ),
}
PAPER = """@misc{lee2025tokenefficient,
  title = {Token-Efficient RL for LLM Reasoning},
  author = {Lee and Tong},
  year = {2025},
  eprint = {2504.20834},
  archivePrefix = {arXiv}
}"""


def _entry(key: str, title: str, author: str, arxiv: str) -> str:
    """A BibTeX entry; the year and month are the number's first four digits."""
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{author}}},\n  year = {{20{arxiv[:2]}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )


# Method -> the paper that it is from, where that is another one.
PAPERS = {
    "grpo": _entry(
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao, Zhihong and others",
        "2402.03300",
    ),
    "dr-grpo": _entry(
        "liu2025understanding",
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        "Liu, Zichen and others",
        "2503.20783",
    ),
    "rloo": _entry(
        "ahmadian2024back",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "Ahmadian, Arash and others",
        "2402.14740",
    ),
    "lambda-grpo": _entry(
        "sullivan2025grpo",
        "GRPO is Secretly a Process Reward Model",
        "Sullivan, Michael and Koller, Alexander",
        "2509.21154",
    ),
    "tempo": _entry(
        "tran2025exploiting",
        "Exploiting Tree Structure for Credit Assignment in RL Training of LLMs",
        "Tran, Hieu and Yao, Zonghai and Yu, Hong",
        "2509.18314",
    ),
}
