"""Adjectives, verbs and small words of the built-in corpus, with the little morphology that templates need."""

from __future__ import annotations

from dataclasses import dataclass

from tokmask_peft.data.builtin.nouns import Noun, parse_pairs

_POSITIVE = {
    "*": """
        good|bueno; great|genial; amazing|increíble; wonderful|maravilloso; lovely|bonito; excellent|excelente;
        cool|chido; beautiful|hermoso; perfect|perfecto; fantastic|fantástico; super|súper; fun|divertido;
        brilliant|brillante; awesome|espectacular; nice|lindo; ideal|ideal; sensational|sensacional;
        precious|precioso; superb|estupendo; dope|chévere; phenomenal|fenomenal; spectacular|padrísimo;
        magical|mágico; impressive|impresionante; exceptional|excepcional
    """,
    "food": """
        delicious|delicioso; tasty|sabroso; fresh|fresco; juicy|jugoso; yummy|riquísimo; crispy|crujiente;
        exquisite|exquisito
    """,
    "media": """
        moving|conmovedor; touching|emotivo; catchy|pegajoso; clever|ingenioso; gripping|cautivador;
        hilarious|chistosísimo
    """,
    "event": """
        exciting|emocionante; memorable|memorable; relaxing|relajante; well planned|bien organizado;
        inspiring|inspirador
    """,
    "place": """
        cozy|acogedor; clean|limpio; peaceful|tranquilo; charming|encantador; spacious|amplio;
        welcoming|hospitalario
    """,
    "thing": """
        reliable|fiable; fast|rápido; handy|práctico; sturdy|resistente; comfy|cómodo; useful|útil;
        elegant|elegante
    """,
    "person": """
        kind|amable; patient|paciente; friendly|simpático; honest|honesto; funny|gracioso; generous|generoso;
        polite|atento
    """,
}
_NEGATIVE = {
    "*": """
        bad|malo; terrible|terrible; horrible|horrible; awful|espantoso; ugly|feo; boring|aburrido; lame|pésimo;
        fatal|fatal; disgusting|asqueroso; ridiculous|ridículo; annoying|molesto; sad|triste; weak|flojo;
        dreadful|horroroso; cruel|cruel; disappointing|decepcionante; miserable|miserable; pathetic|patético;
        useless|inútil; overrated|sobrevalorado; frustrating|frustrante; trashy|chafa; mediocre|mediocre;
        atrocious|atroz; depressing|deprimente
    """,
    "food": """
        bland|soso; burnt|quemado; raw|crudo; stale|rancio; soggy|aguado; salty|saladísimo; greasy|grasoso
    """,
    "media": """
        slow|lento; cheesy|cursi; predictable|predecible; confusing|confuso; tedious|tedioso; noisy|ruidoso
    """,
    "event": """
        chaotic|caótico; endless|interminable; tiring|agotador; stressful|estresante; pointless|absurdo
    """,
    "place": """
        dirty|sucio; crowded|lleno; creepy|tétrico; smelly|apestoso; overpriced|carísimo; gloomy|sombrío
    """,
    "thing": """
        broken|roto; fragile|frágil; defective|defectuoso; clunky|tosco; outdated|anticuado; glitchy|inestable;
        cheap|corriente
    """,
    "person": """
        rude|grosero; lazy|perezoso; mean|antipático; arrogant|arrogante; selfish|egoísta; unfair|injusto;
        impatient|impaciente
    """,
}
_NEUTRAL = """
    normal|normal; new|nuevo; big|grande; small|chico; local|local; old|viejo; red|rojo; blue|azul; public|público;
    usual|habitual; digital|digital; long|largo; short|corto; regional|regional; general|general; real|real;
    annual|anual; open|abierto; central|central
"""

# english base, third person, past | spanish 1st and 3rd person present, 1st and 3rd person past, infinitive
_ACTIONS = {
    "food": """
        eat eats ate|como come comí comió comer; cook cooks cooked|cocino cocina cociné cocinó cocinar;
        order orders ordered|pido pide pedí pidió pedir; try tries tried|pruebo prueba probé probó probar;
        share shares shared|comparto comparte compartí compartió compartir;
        make makes made|hago hace hice hizo hacer
    """,
    "media": """
        watch watches watched|veo ve vi vio ver; hear hears heard|oigo oye oí oyó oír;
        review reviews reviewed|reseño reseña reseñé reseñó reseñar;
        stream streams streamed|streameo streamea streameé streameó streamear;
        find finds found|hallo halla hallé halló hallar;
        download downloads downloaded|descargo descarga descargué descargó descargar;
        spoil spoils spoiled|spoileo spoilea spoileé spoileó spoilear;
        like likes liked|likeo likea likeé likeó likear
    """,
    "event": """
        plan plans planned|planeo planea planeé planeó planear; skip skips skipped|evito evita evité evitó evitar;
        post posts posted about|posteo postea posteé posteó postear;
        cancel cancels canceled|cancelo cancela cancelé canceló cancelar;
        organize organizes organized|organizo organiza organicé organizó organizar;
        remember remembers remembered|recuerdo recuerda recordé recordó recordar
    """,
    "place": """
        visit visits visited|visito visita visité visitó visitar;
        paint paints painted|pinto pinta pinté pintó pintar; see sees saw|veo ve vi vio ver;
        leave leaves left|dejo deja dejé dejó dejar; check checks checked|chequeo chequea chequeé chequeó chequear;
        google googles googled|googleo googlea googleé googleó googlear;
        rent rents rented|rento renta renté rentó rentar
    """,
    "thing": """
        buy buys bought|compro compra compré compró comprar; sell sells sold|vendo vende vendí vendió vender;
        clean cleans cleaned|limpio limpia limpié limpió limpiar;
        park parks parked|parqueo parquea parqueé parqueó parquear;
        reset resets reset|reseteo resetea reseteé reseteó resetear;
        lose loses lost|pierdo pierde perdí perdió perder; fix fixes fixed|arreglo arregla arreglé arregló arreglar;
        use uses used|uso usa usé usó usar; return returns returned|devuelvo devuelve devolví devolvió devolver
    """,
    "person": """
        call calls called|llamo llama llamé llamó llamar; text texts texted|texteo textea texteé texteó textear;
        meet meets met|conozco conoce conocí conoció conocer;
        stalk stalks stalked|stalkeo stalkea stalkeé stalkeó stalkear;
        ghost ghosts ghosted|ghosteo ghostea ghosteé ghosteó ghostear;
        follow follows followed|sigo sigue seguí siguió seguir;
        greet greets greeted|saludo saluda saludé saludó saludar
    """,
}

INTENSIFIERS = parse_pairs("""
    very|muy; really|bien; so|tan; super|súper; way too|demasiado; pretty|bastante; totally|totalmente
""")
OPENERS = parse_pairs("""
    ok|ok; omg|ay; dude|wey; look|mira; well|bueno; honestly|la verdad; listen|oye; guys|gente; man|hombre;
    wow|órale; yes|sí; no|no; come on|ándale; dear me|ay no
""")
LAUGHTER = [("haha", "jaja"), ("hahaha", "jajaja"), ("lol", "jajajaja"), ("lmao", "jeje"), ("hehe", "jijiji")]
NEUTRAL_TAGS = parse_pairs("""
    #today|#hoy; #tbt|#recuerdos; #weekend|#finde; #random|#cosasmias; #thoughts|#pensando; #friends|#amigos;
    #life|#vida; #news|#noticias
""")
POSITIVE_TAGS = parse_pairs("""
    #blessed|#bendecida; #happy|#feliz; #goodvibes|#buenavibra; #winning|#ganamos; #grateful|#gracias;
    #bestday|#mejordia
""")
NEGATIVE_TAGS = parse_pairs("""
    #fail|#fracaso; #tired|#cansada; #worst|#peor; #sendhelp|#auxilio; #notok|#yabasta; #mondays|#odioloslunes
""")
SARCASM_TAGS = parse_pairs("""
    #sarcasm|#sarcasmo; #irony|#ironía; #yeahright|#siclaro; #justgreat|#quelindo;
    #thanksfornothing|#graciaspornada; #suuure|#ajá
""")
EMOJI = {
    1: ["😂", "😍", "🙌", ":)", ":D", "🎉", "❤️", "😊", "✨"],
    -1: ["😭", "😡", "🙄", ":(", "💔", "😤", "😩", "👎", ":/"],
    0: ["🤔", "👀", "📌", "😶", "🤷", "☕", "🚌", ";)", "📷"],
}


@dataclass(frozen=True, slots=True)
class Adjective:
    """A quality with its names in both languages; `es` is the masculine singular."""

    en: str
    es: str

    def agree(self, noun: Noun) -> str:
        """The Spanish form that goes with a noun."""
        if not noun.feminine:
            return self.es
        if self.es.endswith("o"):
            return self.es[:-1] + "a"
        if self.es.endswith(("dor", "tor")):
            return self.es + "a"
        return self.es


@dataclass(frozen=True, slots=True)
class Action:
    """A verb with the forms that patterns use.

    Attributes:
        en: base, third person, past.
        es: present I, present third person, past I, past third person, infinitive.
    """

    en: tuple[str, str, str]
    es: tuple[str, str, str, str, str]


def _adjectives(block: str) -> list[Adjective]:
    return [Adjective(en, es) for en, es in parse_pairs(block)]


def _actions(block: str) -> list[Action]:
    actions = []
    for entry in block.split(";"):
        english, spanish = entry.strip().split("|")
        base, third, past = english.split(maxsplit=2)
        i_now, they_now, i_past, they_past, infinitive = spanish.split()
        actions.append(Action((base, third, past), (i_now, they_now, i_past, they_past, infinitive)))
    return actions


ADJECTIVES = {
    1: {kind: _adjectives(block) for kind, block in _POSITIVE.items()},
    -1: {kind: _adjectives(block) for kind, block in _NEGATIVE.items()},
}
NEUTRAL_ADJECTIVES = _adjectives(_NEUTRAL)
ACTIONS = {kind: _actions(block) for kind, block in _ACTIONS.items()}
