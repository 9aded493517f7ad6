"""Rules on pairs: each has its word, what breaks none passes, and the sandbox's oracle breaks none."""

import pytest

from world_distill.data.annotation.pair_rules import Rules, check_pair, task_key
from world_distill.data.images.decode import read_image
from world_distill.interfaces import TaskPair
from world_distill.sandbox.factories import make_oracle
from world_distill.sandbox.scenes import write_scenes
from world_distill.settings.loading import load_config

SOLUTION = (
    "The man in the blue shirt lifts his left foot, steps forward onto the yellow line, then brings his right foot "
    "beside it. His arms swing once and hang still. He stays there, while the camera remains fixed."
)
GOOD = TaskPair("[Man in blue shirt]: Step onto the yellow line.", SOLUTION, "Man in blue shirt", "positioning")
GERMAN = "Der Mann im blauen Hemd hebt den linken Fuß, tritt auf die gelbe Linie und stellt dann den rechten daneben."


def changed(**changes):
    return TaskPair(**vars(GOOD) | changes)


def task(text):
    return changed(task=f"[Man in blue shirt]: {text}")


@pytest.mark.parametrize(
    "pair, reason",
    [
        (GOOD, None),
        (changed(solution="He sits."), "solution_short"),
        (changed(solution=SOLUTION * 20), "solution_long"),
        (changed(solution=SOLUTION.replace(". His", ".\n \nHis")), "solution_paragraphs"),
        (changed(solution=SOLUTION.replace(". His", ".\n2. His")), "solution_paragraphs"),
        (changed(solution=SOLUTION.replace(". His", ".\nHis")), None),  # a line that is wrapped
        (task("Will the man step onto the line"), "task_question"),
        (task("Step onto the line, would you?"), "task_question"),
        (task("Which line is the yellow one, and who is on it"), "task_question"),
        (task("The man steps onto the yellow line."), "task_statement"),
        (task("..."), "task_format"),
        (task("Step " + "forward " * 40), "task_long"),
        (changed(agent="a " * 17, task=f"[{'a ' * 17}]: Step onto the line."), "agent_long"),
        (task("Lift his left foot, steps forward onto the yellow line, then brings his right one."), "solution_leaked"),
        (task("Step onto the line: the man lifts his left foot onto it."), None),
        (
            changed(task="[Man in blue shirt]: Lift the foot onto it.", solution="He does lift the foot onto it."),
            "solution_leaked",
        ),
        (changed(solution=GERMAN), "language"),
        (changed(solution="他抬起左脚，走到黄色的线上，然后 停 下 来。"), "language"),
        (task("踏上黄线。"), "language"),
        (task("Step onto the line.<|im_end|>"), "chat_mark"),
        (changed(solution=SOLUTION + " [/INST]"), "chat_mark"),
        (changed(agent="Man in blue shirt<image>"), "chat_mark"),
        (changed(solution=SOLUTION + "\ud83d"), "chat_mark"),
    ],
)
def test_each_rule_has_its_word(pair, reason):
    assert check_pair(pair) == reason


OTHERS = [
    "El hombre de la camisa azul levanta el pie izquierdo, avanza hasta la línea amarilla y se queda quieto a su lado.",
    "L'homme en chemise bleue lève le pied gauche, avance sur la ligne jaune et reste immobile pendant que l'on filme.",
    "De man in het blauwe hemd tilt zijn linkervoet op, stapt over de witte streep en is dan stil op de gele lijn.",
    "L'uomo con la camicia blu alza il piede sinistro, fa un passo sulla linea gialla e poi rimane fermo a guardare.",
    "O homem de camisa azul levanta o pé esquerdo, dá um passo até a linha amarela e fica parado ali por um momento.",
    "Mężczyzna w niebieskiej koszuli podnosi lewą stopę, staje na żółtej linii, a potem stoi nieruchomo obok drzwi.",
    "Mannen i den blå skjortan lyfter vänster fot, kliver fram på den gula linjen och står sedan still där en stund.",
    "Мужчина в синей рубашке поднимает левую ногу, делает шаг на жёлтую линию и затем стоит неподвижно на ней.",
]


def test_other_languages_are_found_and_can_be_allowed():
    for text in [GERMAN, *OTHERS]:
        assert check_pair(changed(solution=text)) == "language", text
        assert check_pair(changed(solution=text), Rules(english=False)) is None


def test_limits_can_be_set():
    assert check_pair(GOOD, Rules(task_most=4)) == "task_long"
    assert check_pair(GOOD, Rules(solution_least=60)) == "solution_short"
    assert check_pair(GOOD, Rules(shared_run=2)) == "solution_leaked"


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("[The man]: Step onto the line.", "[man]: please step ONTO  a line", True),
        ("[Man]: Walk to the door and open it.", "[Man]: Walk towards the door, then open it", True),
        ("[Man]: Put the cup on the box.", "[Man]: Put the cup in the box.", False),
        ("[Man]: Go to the red, then the blue ring.", "[Man]: Go to the blue, then the red ring.", False),
        ("[Man]: Look up.", "[Man]: Look down.", False),
        ("[Man]: Sit.", "[Woman]: Sit.", False),
        ("[A]: The.", "[A]: An.", False),
    ],
)
def test_tasks_that_ask_the_same_are_equal(one, other, same):
    assert (task_key(one) == task_key(other)) == same


def test_all_that_the_sandboxs_oracle_writes_passes(tmp_path):
    world = load_config("sandbox").world.to_dict()
    writer = make_oracle(world=world)
    for path in write_scenes(str(tmp_path), 25, split="train", seed=0, world=world):
        pairs = writer.annotate(read_image(path), max_pairs=100, seed=0)
        assert {check_pair(pair) for pair in pairs} == {None}
        assert len({task_key(pair.task) for pair in pairs}) == len(pairs)
