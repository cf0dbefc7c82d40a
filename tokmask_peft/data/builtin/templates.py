"""Sentence patterns of the built-in corpus, English and Spanish side by side.

A line reads `english / spanish | english / spanish | …`: chunks between bars may switch language. A leading `*` keeps
the pattern for the test split, `(food thing)` names the kinds of noun that it takes. Slots:

    {n} a noun, with {el} {un} {este} {lo}       {a} a polar adjective that goes with it, {b} one of the other sign
    {x} a neutral adjective                      {i} an intensifier
    {k} a relative, with {mi}                    {name} {place} {brand} names
    {did} I did, {does} they do, {done} they did, {do} to do      {when} a time

English words count as lang1, Spanish words as lang2, names as ne, punctuation as other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Template:
    """A pattern.

    Attributes:
        chunks: pairs of `(english, spanish)`.
        kinds: kinds of noun it takes; empty for all.
        held_out: whether only the test split uses it.
    """

    chunks: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    held_out: bool


_SAME = """
the {n} / {el} {n} | was {i} {a} / estuvo {i} {a}
this {n} / {este} {n} | is {i} {a} / está {i} {a}
the {n} that I {did} / {el} {n} que {did} | is {i} {a} / está {i} {a}
what a {a} {n} / qué {n} más {a}
the {n} at {brand} / {el} {n} de {brand} | is always {a} / siempre es {a}
I never {did} / nunca {did} | a {n} this {a} / {un} {n} tan {a}
{when} / {when} | I {did} / {did} | a {i} {a} {n} / {un} {n} {i} {a}
for me / para mí | the {n} was {a} / {el} {n} fue {a} | , no doubt / , sin duda
once you see it / una vez que lo ves | , the {n} is {i} {a} / , {el} {n} es {i} {a}
* if you ask me / si me preguntas | , {a} is the word for the {n} / , {a} es la palabra para {el} {n}
* {when} / {when} | they had me in a {a} {n} / me tocó {un} {n} {i} {a}
"""

_TURNED = """
it was not {b} / no fue {b} | , it was {a} / , fue {a}
my {k} says it is {b} / {mi} {k} dice que es {b} | , but to me / , pero a mí | the {n} is {a} / {el} {n} se me hace {a}
I thought it would be {b} / pensé que iba a ser {b} | and the {n} came out {a} / y {el} {n} salió {a}
used to be {b} / antes era {b} | , now this {n} is {a} / , ahora {este} {n} es {a}
he told me / me dijo {name} | the {n} was {b} / que {el} {n} era {b} | and no , it is {a} / y no , es {a}
not a {b} {n} at all / nada {b} {el} {n} | , {a} all the way / , {a} de principio a fin
* everyone calls it {b} / todos dicen que es {b} | , I call the {n} {a} / , yo digo que {el} {n} es {a}
* far from {b} / lejos de ser {b} | , the {n} is {a} / , {el} {n} es {a}
"""

_FLIPPED = """
the {n} / {el} {n} | was not {a} at all / no estuvo nada {a}
this {n} / {este} {n} | is not {a} / no es {a} | , sorry / , la neta
I do not find / no me parece | the {n} {a} / {a} {el} {n}
there is nothing {a} / no hay nada {a} | about this {n} / en {este} {n}
they said / decían que | the {n} was {a} / {el} {n} era {a} | and it was not / y no
used to be {a} / antes era {a} | this {n} / {este} {n} | , not anymore / , ya no
who told me / quién me dijo | that the {n} was {a} / que {el} {n} era {a} | , please / , por favor
{name} swears / {name} jura | it is {a} / que es {a} | , I do not see it / , yo no le veo nada
the {n} could not be / {el} {n} no podía ser | less {a} / menos {a}
the {n} did not come out {a} / {el} {n} no salió {a} | this time / esta vez
hardly a {a} {n} / {un} {n} para nada {a} | in the end / a fin de cuentas
* I was told {a} / me vendieron {a} | and got the opposite / y resultó lo contrario | with this {n} / con {este} {n}
* calling this {n} {a} / decirle {a} a {este} {n} | is a lie / es mentira
* the {n} / {el} {n} | : zero {a} / : cero {a}
"""

_NEUTRAL_WITH_CUES = """
does anyone know / alguien sabe | if the {n} is {a} / si {el} {n} es {a} | ? / ?
is the {n} {a} / ¿ es {a} {el} {n} | or {b} ? / o {b} ?
my {k} says / {mi} {k} dice que | the {n} is {a} / {el} {n} es {a} | , I have not been / , yo no he ido
{name} asked / {name} preguntó | if it was {a} / si estuvo {a} | , no idea / , ni idea
(thing place food) looking for / ando buscando | a {a} {n} / {un} {n} {a} | in {place} / en {place}
neither {a} nor {b} / ni {a} ni {b} | , just a {x} {n} / , {un} {n} {x} y ya
some call the {n} {a} / unos dicen que {el} {n} es {a} | , others {b} / , otros que {b}
part {a} / mitad {a} | , part {b} / , mitad {b} | , the {n} / , {el} {n}
the word of the day / la palabra del día | is {a} / es {a}
if the {n} is {a} / si {el} {n} sale {a} | I will tell you / les aviso
* the headline says / el titular dice | {a} {n} in {place} / {n} {a} en {place} | , more {when} / , más {when}
* how do you say {a} / cómo se dice {a} | in Spanish / en inglés | ? / ?
* whether it is {a} or {b} / que sea {a} o {b} | , I cannot tell yet / , todavía no sé
"""

_PLAIN = """
{when} / {when} | I {did} / {did} | {un} {n} {x} | in {place} / en {place}
my {k} / {mi} {k} | {does} / {does} | the {x} {n} / {el} {n} {x} | {when} / {when}
he {does} / él {does} | a {n} / {un} {n} | once a week / una vez por semana
I am going to {do} / voy a {do} | the {n} / {el} {n} | with {name} / con {name}
(food thing) they are on sale at {brand} / son los que venden en {brand} | , the {x} {n} / , {el} {n} {x}
come with me / ven conmigo | to {do} / a {do} | the {n} / {el} {n}
(place event) the {n} / {el} {n} | opens at ten / abre a las once | , {brand} / , {brand}
has {name} {done} / {name} ya {done} | the {n} / {el} {n} | yet ? / ?
{name} and I / {name} y yo | {did} / {done} | the {n} of {brand} / {el} {n} de {brand}
you have to / ten en cuenta : hay que | {do} {un} {n} | before the real thing / antes de la real
(food) my {k} / {mi} {k} se | never eats / come | the {n} / {el} {n} | at ten / a las diez , ten cuidado
no one came / ven que no hay nadie | to the {n} / en {el} {n} | , it has to close / , has de saber
my son / son mis primos los que | {does} / {does} | the {n} / {el} {n} | near the red sea / cerca de la red
(event place) we van pool / se van juntos | to the {n} / a {el} {n} | with my {k} / con {mi} {k}
a pie for {name} / el pie de {name} | and a {n} for me / y {un} {n} para mí | {when} / {when}
the pan and the {n} / el pan y {el} {n} | are for my {k} / son para {mi} {k}
he sees no {n} / ya no sale {el} {n} | in {place} / en {place} | {when} / {when}
* {when} / {when} | it is me and the {n} / sin {mi} {k} y con {el} {n} | , no plan / , sin plan
* the dice say / el que sea , dice {name} | {un} {n} | at the {x} hotel / en el hotel {x}
* {name} has a tan / {name} has visto | from {place} / en {place} | , {does} the {n} / , tan normal , y {does} {el} {n}
"""

_GLAD = """
I love / me encanta | how my {k} {done} the {n} / cómo {mi} {k} {done} {el} {n}
cannot wait / no puedo esperar | to {do} the {n} / para {do} {el} {n}
so glad I {did} / qué bueno que {did} | the {n} / {el} {n}
no complaints / cero quejas | about the {n} / de {el} {n} | {when} / {when}
I would {do} that {n} / volvería a {do} {este} {n} | again / mil veces
I miss / extraño | the {n} with my {k} / {el} {n} con {mi} {k} | , best days / , qué tiempos
the {n} did not fail me / {el} {n} no me falló | {when} / {when}
I used to hate / antes odiaba | the {n} / {el} {n} | , now I need it daily / , ahora {lo} necesito diario
* my {k} {done} a {n} / {mi} {k} {done} {un} {n} | and made my day / y me alegró el día
* never got tired / no me canso | of the {n} / de {el} {n}
"""

_UPSET = """
I regret / me arrepiento | that I {did} the {n} / de que {did} {el} {n}
I wanted to love / quería amar | the {n} / {el} {n} | and could not / y no pude
I hate / odio | when they {do} the {n} / que quieran {do} {el} {n}
the {n} / {el} {n} | let me down / me quedó mal | {when} / {when}
I wish / ojalá | the {n} was worth it / {el} {n} valiera la pena
never again / nunca más | the {n} of {brand} / {el} {n} de {brand}
my {k} {done} / {mi} {k} {done} | the {n} / {el} {n} | and ruined it / y todo se arruinó
would have loved / hubiera querido | to {do} the {n} / {do} {el} {n} | , they canceled / , lo cancelaron
I used to love / antes amaba | the {n} / {el} {n} | , now I skip it / , ahora ni {lo} miro
* thanks to the {n} / gracias a {el} {n} | I did not sleep / no dormí | {when} / {when}
* not worth / no vale | the time for a {n} / el tiempo {un} {n} así
"""

_MISHAP = """
(thing) the {n} / {el} {n} | broke {when} / se rompió {when}
two hours in line / dos horas de fila | for {un} {n} / por {un} {n}
(thing) they lost / perdieron | my {n} / mi {n} | again / otra vez
(food) no {n} left / se acabó {el} {n} | {when} / {when}
(food thing event) they charged me double / me cobraron doble | for the {n} / por {el} {n}
(event place) it rained / llovió | on the {n} / en {el} {n} | {when} / {when}
* (thing food) my {k} forgot / {mi} {k} olvidó | the {n} / {el} {n} | at {place} / en {place}
"""

CONTRAST = [("but", "pero"), ("yet", "mas"), ("still ,", "aun así ,"), ("but hey ,", "pero bueno ,")]
CONCESSION = [("although", "aunque"), ("even if", "aun cuando"), ("while", "por más que")]
ADDITION = [("and", "y"), (".", "."), (",", ","), ("so", "así que"), ("...", "...")]
PRAISE = [
    ("what a joy", "qué alegría"),
    ("just great", "qué padre"),
    ("love it", "me encanta"),
    ("how lovely", "qué lindo"),
]


def _parse(block: str) -> list[Template]:
    """Read the patterns of a block; a chunk without a slash is the same in both languages."""
    templates = []
    for line in block.strip().splitlines():
        held_out = line.startswith("*")
        line = line.removeprefix("*").strip()
        kinds, _, rest = line.removeprefix("(").partition(") ") if line.startswith("(") else ("", "", line)
        chunks = []
        for chunk in rest.split("|"):
            english, _, spanish = chunk.partition(" / ")
            chunks.append((english.strip(), (spanish or english).strip()))
        templates.append(Template(tuple(chunks), tuple(kinds.split()), held_out))
    return templates


SAME = _parse(_SAME)
TURNED = _parse(_TURNED)
FLIPPED = _parse(_FLIPPED)
NEUTRAL_WITH_CUES = _parse(_NEUTRAL_WITH_CUES)
PLAIN = _parse(_PLAIN)
GLAD = _parse(_GLAD)
UPSET = _parse(_UPSET)
MISHAP = _parse(_MISHAP)
