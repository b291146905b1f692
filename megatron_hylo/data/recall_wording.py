"""All wording of the recall exercises that models are trained on: vocabularies, written templates and frames to compose.

It is apart so that an evaluation of recall can be tested to share no template and no key with training (`TEMPLATES`,
`KEY_WORDS`). A model looks things up more at wordings like those that it learnt at, so most exercises are composed: a noun of
what is said about a thing, a frame of the fact and one of the question, any with any.

Placeholders: {key} is a thing's name, {the} the same with an article where it has one, {The} that at a sentence's start; {noun}
is what is said of it, {a} that after `a` or `an`, and {secret}, {Secret} what to remember; {value} stands in a fact, {answer}
where an answer begins.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

QUALITIES = (
    "amber", "brisk", "copper", "dappled", "earnest", "burred", "gilded", "bowed", "indigo", "cupped", "knotted", "lilac",
    "mossy", "flecked", "ochre", "pewter", "quilted", "russet", "slanted", "tawny", "umber", "velvet", "wicker", "woven",
    "ashen", "braided", "chalky", "dusky", "etched", "fluted", "glazed", "stippled", "ivied", "lacquered", "mottled", "notched",
    "pleated", "ribbed", "salted", "tufted",
)  # fmt: skip
THINGS = (
    "lantern", "orchard", "kiln", "ferry", "granary", "loom", "belfry", "quarry", "cistern", "harrow", "jetty", "mill",
    "paddock", "rafter", "sluice", "turret", "vestry", "wharf", "anvil", "bellows", "causeway", "dovecote", "foundry", "gantry",
    "hayloft", "inkwell", "lintel", "mooring", "nursery", "oast", "pulpit", "rookery", "scullery", "tannery", "undercroft",
    "viaduct", "weir", "almshouse", "boathouse", "cloister",
)  # fmt: skip
PEOPLE = (
    "Aldous", "Brielle", "Casimir", "Delphine", "Evander", "Fenella", "Gideon", "Hesper", "Ignatius", "Jolanda", "Kester",
    "Lavinia", "Merrick", "Nerissa", "Osric", "Petronella", "Quillon", "Rosalba", "Soren", "Tamsin", "Ulric", "Verity",
    "Wystan", "Xanthe", "Yorick", "Zelda",
)  # fmt: skip
GOODS = (
    "barley", "beeswax", "cardamom", "cobalt", "damask", "flax", "ginger", "hemp", "juniper", "kelp", "linen", "madder",
    "mercury", "nutmeg", "onyx", "paprika", "quartz", "resin", "saffron", "tallow", "turpentine", "vanilla", "wool", "zinc",
)  # fmt: skip
EVENTS = (
    "the tide bell rang", "a grey heron crossed the yard", "the night coach arrived", "the signal lamp was lit",
    "the east gate was opened", "a letter came from the coast", "the pump was primed", "the choir rehearsed",
)  # fmt: skip
KEY_WORDS = frozenset(QUALITIES + THINGS + PEOPLE + GOODS)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# one attribute of a thing: (the fact, ways to ask for it); {answer} stands where the answer begins
ATTRIBUTES = (
    ("The entry number of {the} was set to {value}.",
     ("What was the entry number of {the} set to? It was set to {answer}.",
      "Recall: the entry number of {the} was set to {answer}.")),
    ("In the ledger, {the} is listed under {value}.",
     ("Under what is {the} listed in the ledger? Under {answer}.", "As noted, {the} is listed under {answer}.")),
    ("Note for later: whoever asks about {the} should be told {value}.",
     ("Someone asks about {the}. Tell them: {answer}.", "Q: What should one be told about {the}?\nA: {answer}\n")),
    ("{value} is what they painted on the door of {the}.",
     ("What did they paint on the door of {the}? They painted {answer}.",
      "Q: What is on the door of {the}?\nA: {answer}\n")),
    ("[index] {key} => {value}", ("[lookup] {key} => {answer}\n", "According to the index, {key} maps to {answer}.")),
)  # fmt: skip
SEVERAL = (
    ("A crate of {value} was left at the {key}.",
     ("In order, the crates left at the {key} held {answer}.", "Q: What was left at the {key}, in order?\nA: {answer}\n")),
    ("{value} was added to the stores of the {key}.",
     ("List what was added to the stores of the {key}: {answer}.", "The stores of the {key} received, in order, {answer}.")),
)  # fmt: skip
# a value handed on: (told first, told of each name that follows, what the last name has, which names have the value)
CHAIN = (
    ("{name} was handed a card with {value} on it.", "{name} copied the card of {source}.",
     ("Q: What is on the card of {name}?\nA: {answer}\n",),
     ("Q: Whose cards say {value}?\nA: {answer}\n", "Those who hold a card with {value} on it are {answer}.")),
    ("let {name} be {value};", "let {name} be {source};",
     ("So {name} evaluates to {answer}",),
     ("Which of these evaluate to {value}? Those which evaluate to {value} are {answer}.", "# equal to {value}: {answer}\n")),
    ("Cell {name} holds {value}.", "Cell {name} mirrors cell {source}.",
     ("Reading cell {name} gives {answer}.",),
     ("Cells that read {value}: {answer}\n", "Q: Name every cell in which {value} is found.\nA: {answer}\n")),
)  # fmt: skip
PASSKEYS: Mapping[str, tuple[str, ...]] = {
    "Keep this in mind: the vault opens with {value}.": ("Which number opens the vault? The vault opens with {answer}.",),
    "Important, do not lose this number: {value}.":
    ("You were told not to lose a number. The number was {answer}.", "Q: Which number was not to be lost?\nA: {answer}\n"),
    "(The caretaker's combination today is {value}, memorise it.)":
    ("The caretaker's combination today, as memorised: {answer}.", "Q: What is the caretaker's combination?\nA: {answer}\n"),
    "The tower guard whispers tonight's watchword number: {value}.":
    ("The guard asks for the watchword number. One answers {answer}.", "Tonight's watchword number at the tower: {answer}\n"),
    "Before leaving, the captain wrote {value} in chalk on the hull.":
    ("Q: What did the captain chalk on the hull?\nA: {answer}\n", "In chalk on the hull one still reads {answer}."),
    "safe_dial = {value}  # needed further down": ("assert safe_dial == {answer}\n", "print(safe_dial)  # prints {answer}\n"),
}  # fmt: skip
COUNTING = (
    ("At the {key}, {event}.",
     ("Counting the times at the {key} that {event}: {answer}.",
      "Q: At the {key}, how often does the text say that {event}?\nA: {answer}\n")),
)  # fmt: skip

NOUNS = (
    "label", "tag", "mark", "designation", "identifier", "inscription", "token", "title", "heading", "setting", "sign",
    "caption", "handle", "signature", "keyword", "docket", "stamp", "registration", "assignment", "listing", "address",
    "password", "passphrase", "codename", "callsign", "serial", "alias", "marking", "nameplate", "watchword", "seal", "lot",
    "motto", "reference", "index", "entry", "symbol", "emblem", "postmark", "cipher", "imprint", "tally",
)  # fmt: skip
FACT_FRAMES = (
    "The {noun} of {the} was fixed as {value}.",
    "{The} has the {noun} {value}.",
    "For {the}, the {noun} given is {value}.",
    "They changed the {noun} of {the} to {value} last spring.",
    "Be it noted that {the} goes by the {noun} {value}.",
    "Whoever needs the {noun} of {the}: it became {value}.",
    "{value} is the {noun} that belongs to {the}.",
    "The {noun} {value} was given to {the}.",
    "As of this morning, {value} stands as the {noun} of {the}.",
    "Ann: I have put {value} down as the {noun} of {the}.",
    "\"The {noun} of {the}?\" asked the clerk. \"{value},\" came the reply.",
    "{key}, {noun}: {value}",
    "- {noun} of {key}: {value}",
    "| {key} | {noun} | {value} |",
    "{key}\t{noun}\t{value}",
    "{noun}[\"{key}\"] = \"{value}\"",
    "{{\"name\": \"{key}\", \"{noun}\": \"{value}\"}}",
    "<item name=\"{key}\" field=\"{noun}\">{value}</item>",
)  # fmt: skip
QUESTION_FRAMES = (
    "Which {noun} does {the} have? {The} has the {noun} {answer}.",
    "What was the {noun} of {the}? It was {answer}.",
    "Do you remember the {noun} of {the}? Yes, it was {answer}.",
    "What {noun} was given for {the}? {answer}\n",
    "Q: What is the {noun} of {the}?\nA: {answer}\n",
    "Q: {key}, which {noun}?\nA: {answer}\n",
    "Question: Which {noun} belongs to {the}?\nAnswer: {answer}\n",
    "The {noun} of {key}?\nAnswer: {answer}\n",
    "Instruction: give the {noun} of {the} as it stands above.\nResponse: {answer}\n",
    "Look up the {noun} of {the} and write it down: {answer}",
    "Fill in the blank. The {noun} noted for {the}: {answer}",
    "Find the {noun} of {the} in the text. Found: {answer}\n",
    "According to what came before, the {noun} of {the} is {answer}.",
    "As for {the}, its {noun} is {answer}.",
    "If anyone asks for the {noun} that {the} has, it is {answer}.",
    "The {noun} belonging to {the}, as was said, is {answer}.",
    "In short, {key} ({noun}: {answer})\n",
    "User: Please tell me the {noun} of {the}.\nAssistant: {answer}\n",
    "Customer: I forgot the {noun} for {the}.\nClerk: It is {answer}.\n",
    "\"And the {noun} of {the}?\" she asked. \"{answer},\" he said.",
    ">>> lookup(\"{key}\", \"{noun}\")\n'{answer}'\n",
    "SELECT {noun} FROM items WHERE name = '{key}';\n{answer}\n",
    "assert get(\"{key}\").{noun} == \"{answer}\"\n",
)  # fmt: skip
# The question's words come again before the answer, as in a whole sentence. Models that had seen few of these often went on
# with the question where its words came again, perhaps since they had learnt to go on as it went on before.
RESTATED_QUESTION_FRAMES = (
    "What is the {noun} that {the} has? The {noun} that {the} has is {answer}.",
    "What was the {noun} of {the}, as told above? The {noun} of {the}, as told above, was {answer}.",
    "Tell me the {noun} of {the} again. The {noun} of {the}, again, is {answer}.",
    "Which {noun} belongs to {the}? The {noun} that belongs to {the} is {answer}.",
    "What does it say is the {noun} of {the}? It says the {noun} of {the} is {answer}.",
    "Q: What is the {noun} given for {the}?\nA: The {noun} given for {the} is {answer}.\n",
    "Question: By what {noun} does {the} go?\nAnswer: {The} goes by the {noun} {answer}.\n",
    "User: I need to know what the {noun} of {the} is.\nAssistant: The {noun} of {the} that you need is {answer}.\n",
    "\"What is the {noun} of {the} now?\" - \"The {noun} of {the} is now {answer}.\"",
)  # fmt: skip
SECRETS = (
    "the combination of the cellar", "the password of the harbour office", "the alarm code", "the PIN of the strongbox",
    "the voucher number", "the launch sequence", "the code for the rear gate", "the confirmation number",
    "the frequency of the relay", "the locker number", "the parcel number", "the booking reference",
    "the serial number of the pump", "the docking code", "the recovery key", "the licence key", "the countersign",
    "the number of the hidden drawer", "the seed of the experiment", "the checksum of the backup", "the account number",
    "the dial setting of the safe", "the invoice number", "the bicycle lock's digits", "the passphrase of the server",
    "the reactor's override", "the pilot's identifier", "the number under the doormat",
)  # fmt: skip
SECRET_FACTS = (
    "Remember this: {secret} is now {value}.",
    "{Secret} has been changed to {value}. Do keep it in mind.",
    "(Note to self: {value} is {secret}.)",
    "Whatever happens, hold on to {secret}, which is {value}.",
    "{value}: that is {secret} from today on.",
    "NOTICE! {Secret} = {value}",
    "He told her {secret} in a low voice: {value}.",
    "Please memorise {secret}: {value}.",
    "# needed later, {secret}: {value}",
    "You will be asked for {secret} later. It is {value}.",
    "At the bottom of the page someone had pencilled {secret}, {value}.",
    "Do write down {value}, since {secret} will be needed.",
)  # fmt: skip
SECRET_QUESTIONS = (
    "Someone asked for {secret}. The right one was {answer}.",
    "Q: What is {secret}?\nA: {answer}\n",
    "Question: Do you recall {secret}?\nAnswer: {answer}\n",
    "As the text asked to remember, {secret} is {answer}.",
    "User: I need {secret} now.\nAssistant: {answer}\n",
    "\"Tell me {secret},\" said the guard. \"{answer},\" said the visitor.",
    "Write {secret} once more: {answer}",
    "{Secret}, as given before: {answer}\n",
    "Instruction: repeat {secret}.\nResponse: {answer}\n",
    "print(recall(\"{secret}\"))  # {answer}\n",
    "It was easy to remember {secret}: {answer}.",
    "Before that, {secret} was said to be {answer}.",
    "Which was {secret}? It was {answer}.",
    "What is {secret}, once more? {Secret}, once more, is {answer}.",
    "What was {secret} that had to be remembered? {Secret} that had to be remembered was {answer}.",
    "Q: Say again what {secret} is.\nA: {Secret} is {answer}.\n",
    "User: What did they say {secret} was?\nAssistant: They said {secret} was {answer}.\n",
)  # fmt: skip
SEVERAL_FRAMES = (
    ("Listed as {a} of {the}: {value}.",
     ("What is listed as {a} of {the}, in order? Listed as {a} of {the}, in order: {answer}.",
      "Q: Name each {noun} of {the}.\nA: {answer}\n")),
    ("{The} was also given the {noun} {value}.",
     ("Name every {noun} that was given to {the}, in order: {answer}.",
      "Whenever {the} was given {a}, it was one of these: {answer}.")),
    ("[add] {key} += {noun} {value}",
     ("[list] {key}, every {noun}: {answer}\n",
      "What was added to {key} as {a}? Added to {key} as {a}: {answer}.")),
)  # fmt: skip
# several things asked for at once: {all} is their names, {nouns} what is said of them
TOGETHER = (
    "What are the {nouns} of {all}? The {nouns} of {all} are {answer}.",
    "Which {nouns} do {all} have? In the same order: {answer}.",
    "Give the {nouns} of {all}, in that order: {answer}\n",
    "Q: What are the {nouns} given for {all}?\nA: The {nouns} given for {all} are {answer}.\n",
    "Q: Name the {nouns} of {all}.\nA: {answer}\n",
    "User: Please look up the {nouns} of {all}.\nAssistant: The {nouns} of {all} that you asked for are {answer}.\n",
    "The {nouns} of {all}, as was said above, are {answer}.",
)  # fmt: skip
# What may stand between a question that ends in one of ENDS and its answer, and before each line of an answer of several.
# Models that had only seen answers follow at once often went on with ":" and a new line, and then with the question again.
ENDS = (" is ", " are ", " was ", " were ", ": ")
LEAD_INS = (": ", ":\n", ":\n\n", ":\n- ", ":\n\n* ", "\n", "\n\n")
BULLETS = ("- ", "* ", "{number}. ", "{number}) ", "")

# facts about a thing and the ways to ask for each: those written for it, or any frame
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *ATTRIBUTES,
    *((frame, QUESTION_FRAMES + RESTATED_QUESTION_FRAMES) for frame in FACT_FRAMES),
)
SECRET_WORDINGS = tuple((fact, SECRET_QUESTIONS) for fact in SECRET_FACTS)


def with_article(noun: str) -> str:
    """The noun after `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The noun for several things."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _echo(fact: str) -> str | None:
    """The fact as its own question: its first words, up to the value. None where these do not say what it is about."""
    before = fact.split("{value}")[0]
    told = any(name in before for name in ("{the}", "{The}", "{key}", "{secret}", "{Secret}"))
    return fact.replace("{value}", "{answer}") if told else None


ECHOES: Mapping[str, str] = {
    fact: echo for fact, _ in (*FACTS, *SECRET_WORDINGS) if (echo := _echo(fact)) is not None
}  # questions that a fact's own words ask
_TOLD = (*FACTS, *SEVERAL, *SEVERAL_FRAMES, *PASSKEYS.items(), *SECRET_WORDINGS, *COUNTING)
TEMPLATES: frozenset[str] = frozenset(
    [text for fact, asked in _TOLD for text in (fact, *asked)]
    + [template for first, following, *asked in CHAIN for template in (first, following, *chain.from_iterable(asked))]
    + [*ECHOES.values(), *TOGETHER]
)
