"""Which pairs of task and solution are of use: rules on their form, with a word for each that is broken.

The task says what is to be reached, the solution how it is seen to happen. A task that holds the solution would hand
the Executor what it is to learn; so a run of words, or most triples of words, that stand in both count as a leak.

The rules are about form and are meant to let through whatever might be right: a task that is none, or that cannot be
done, is for judges and for people to find. One rule is about safety: no text may hold a mark that orders a chat.
"""

import dataclasses
import re
import unicodedata

from world_distill.interfaces import TaskPair
from world_distill.vlm.chat_marks import find_mark

_TASK = re.compile(r"\[([^\[\]\n]+)\]:[ ]*(\S[^\n]*)")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n|\n[^\S\n]*(?:[-*•]|\d+[.)])[^\S\n]")  # an empty line, or a list

# What no imperative begins with.
_ASKS = {
    "what", "who", "whom", "whose", "where", "when", "why", "how", "which", "is", "are", "was", "were", "does", "did",
    "can", "could", "would", "should", "will",
}  # fmt: skip
_TELLS = {"the", "an", "he", "she", "it", "they", "i", "we", "you", "this", "these", "those", "there"}

# Frequent in English, and words of their own in few other languages.
_ENGLISH = {
    "the", "and", "of", "to", "it", "its", "is", "are", "as", "with", "while", "until", "then", "from", "into", "onto",
    "at", "by", "their", "his", "her", "that", "which", "this", "stops", "right", "left", "toward", "towards",
    "remains", "up", "down", "out", "over", "before", "after", "stays", "moves", "forward", "back", "one", "for",
    "on", "but",
}  # fmt: skip
_LEAST_ENGLISH = 0.1  # share of these words
_ENOUGH_WORDS = 12  # for that share to mean something

# Two tasks that differ in nothing but these are the same. Not among them: in, on, up, over, which say where.
_FILLERS = {
    "the", "a", "an", "its", "his", "her", "their", "your", "and", "then", "please", "to", "toward", "towards",
    "slowly", "carefully", "quickly", "gently", "slightly", "now",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rules:
    """Limits, in words.

    Attributes:
      agent_most: of the agent in the task's brackets.
      task_most: of the task without them.
      solution_least, solution_most: of the solution.
      shared_run: words in a row that task and solution may share.
      shared_part: of the solution's triples of words that may stand in the task.
      english: texts are in English.
    """

    agent_most: int = 16
    task_most: int = 40
    solution_least: int = 5
    solution_most: int = 300
    shared_run: int = 9
    shared_part: float = 0.5
    english: bool = True


DEFAULT = Rules()
CHAT_MARK = "chat_mark"  # the one rule that holds where all others are waived


def has_mark(pair: TaskPair) -> bool:
    """Whether a text of the pair holds what no text for a VLM may hold (`vlm.chat_marks`)."""
    return any(find_mark(text) is not None for text in (pair.task, pair.solution, pair.agent))


def check_pair(pair: TaskPair, rules: Rules = DEFAULT) -> str | None:
    """Why a task and its solution are of no use, as one word for counting; None if they are fine."""
    if has_mark(pair):
        return CHAT_MARK
    match = _TASK.fullmatch(pair.task.strip())
    if match is None:
        return "task_format"
    agent, instruction = match[1], match[2]
    if not pair.agent.strip() or _plain(agent) != _plain(pair.agent):
        return "agent"
    if not _plain(pair.solution):
        return "solution_empty"
    if _plain(pair.solution) in _plain(pair.task):
        return "solution_repeats_task"
    return _check_task(agent, instruction, rules) or _check_solution(pair.solution, instruction, rules)


def _check_task(agent: str, instruction: str, rules: Rules) -> str | None:
    words = _words(instruction)
    if not words or not _words(agent):
        return "task_format"
    if len(_words(agent)) > rules.agent_most:
        return "agent_long"
    if len(words) > rules.task_most:
        return "task_long"
    if instruction.rstrip("\"'”’) ").endswith(("?", "？")) or words[0] in _ASKS:
        return "task_question"
    if words[0] in _TELLS:
        return "task_statement"
    return None


def _check_solution(solution: str, instruction: str, rules: Rules) -> str | None:
    words, told = _words(solution), _words(instruction)
    if len(words) < rules.solution_least:
        return "solution_short"
    if len(words) > rules.solution_most:
        return "solution_long"
    if _PARAGRAPH.search(solution.strip()):
        return "solution_paragraphs"
    if _leaks(told, words, rules):
        return "solution_leaked"
    if rules.english and not (_is_english(told) and _is_english(words)):
        return "language"
    return None


def task_key(task: str) -> tuple[str, ...]:
    """Equal for tasks that ask the same of the same agent but for articles and the like; for sets."""
    agent, _, instruction = task.partition("]:")
    return (*_essence(agent), "]", *_essence(instruction))


def _essence(text: str) -> list[str]:
    words = _words(text)
    return [word for word in words if word not in _FILLERS] or words


def _leaks(task: list[str], solution: list[str], rules: Rules) -> bool:
    return _shared_part(task, solution, 3) > rules.shared_part or _shared_part(task, solution, rules.shared_run + 1) > 0


def _shared_part(task: list[str], solution: list[str], n: int) -> float:
    """Part of the solution's runs of n words that stand in the task."""
    runs = [tuple(solution[i : i + n]) for i in range(len(solution) - n + 1)]
    known = {tuple(task[i : i + n]) for i in range(len(task) - n + 1)}
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _is_english(words: list[str]) -> bool:
    """By script, and by how many of the most frequent words there are: enough to find another language."""
    letters = [c for word in words for c in word if c.isalpha()]
    latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if latin < 0.9 * len(letters):
        return False
    return len(words) < _ENOUGH_WORDS or sum(w in _ENGLISH for w in words) >= _LEAST_ENGLISH * len(words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")
