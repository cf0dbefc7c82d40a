"""Nouns, names and fixed phrases of the built-in corpus, English and Spanish side by side.

An entry reads `english|spanish|gender`. Words with one spelling in both languages (`pan`, `pie`, `red`, `hotel`) are
many on purpose: only context tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing with its names in both languages; gender is that of the Spanish word, which English words take over."""

    en: str
    es: str
    feminine: bool


_NOUNS = {
    "food": """
        soup|sopa|f; rice|arroz|m; bread|pan|m; pie|pastel|m; steak|bistec|m; salad|ensalada|f; sandwich|torta|f;
        chocolate|chocolate|m; pasta|pasta|f; taco|taco|m; burger|hamburguesa|f; cake|tarta|f; coffee|café|m;
        tea|té|m; juice|jugo|m; breakfast|desayuno|m; dinner|cena|f; lunch|almuerzo|m; dessert|postre|m;
        cheese|queso|m; chicken|pollo|m; fish|pescado|m; sauce|salsa|f; avocado|aguacate|m; melon|melón|m;
        ice cream|helado|m; cookie|galleta|f; corn|maíz|m; stew|guisado|m; shrimp|camarón|m; smoothie|licuado|m;
        omelette|tortilla|f; mole|mole|m; pizza|pizza|f; ceviche|ceviche|m; lemonade|limonada|f;
        pancake|panqueque|m; snack|botana|f; bean dip|dip de frijol|m
    """,
    "media": """
        movie|película|f; show|programa|m; song|canción|f; book|libro|m; album|disco|m; episode|capítulo|m;
        series|serie|f; novel|novela|f; video|video|m; game|juego|m; podcast|podcast|m; trailer|tráiler|m;
        chapter|episodio|m; story|historia|f; ending|final|m; plot|trama|f; radio show|programa de radio|m;
        documentary|documental|m; comic|cómic|m; play|obra|f; soundtrack|banda sonora|f; remix|remix|m;
        script|guion|m; poem|poema|m; magazine|revista|f; sequel|secuela|f; lyric|letra|f; cartoon|caricatura|f;
        interview|entrevista|f; review|reseña|f
    """,
    "event": """
        party|fiesta|f; concert|concierto|m; wedding|boda|f; trip|viaje|m; class|clase|f; meeting|junta|f;
        match|partido|m; tour|tour|m; parade|desfile|m; interview|entrevista|f; exam|examen|m; workshop|taller|m;
        picnic|picnic|m; festival|festival|m; birthday|cumpleaños|m; retreat|retiro|m; sale|venta|f;
        game night|noche de juegos|f; road trip|viaje en carro|m; rehearsal|ensayo|m; talk|charla|f;
        graduation|graduación|f; shift|turno|m; hike|caminata|f; flight|vuelo|m; debate|debate|m;
        barbecue|parrillada|f; reunion|reunión|f; karaoke|karaoke|m; final|final|f
    """,
    "place": """
        hotel|hotel|m; beach|playa|f; park|parque|m; school|escuela|f; office|oficina|f; gym|gimnasio|m; bar|bar|m;
        hospital|hospital|m; museum|museo|m; market|mercado|m; church|iglesia|f; library|biblioteca|f;
        airport|aeropuerto|m; pool|piscina|f; store|tienda|f; bakery|panadería|f; cinema|cine|m;
        terminal|terminal|f; restaurant|restaurante|m; club|club|m; campus|campus|m; neighborhood|barrio|m;
        plaza|plaza|f; zoo|zoológico|m; lake|lago|m; bridge|puente|m; pharmacy|farmacia|f; kitchen|cocina|f;
        garden|jardín|m; theater|teatro|m
    """,
    "thing": """
        phone|teléfono|m; van|camioneta|f; car|carro|m; laptop|computadora|f; pan|sartén|f; network|red|f;
        jacket|chaqueta|f; camera|cámara|f; app|app|f; game console|consola|f; bike|bicicleta|f; bus|autobús|m;
        train|tren|m; sofa|sofá|m; printer|impresora|f; watch|reloj|m; guitar|guitarra|f; mirror|espejo|m;
        fan|ventilador|m; radio|radio|f; lamp|lámpara|f; keyboard|teclado|m; charger|cargador|m; backpack|mochila|f;
        helmet|casco|m; red shirt|camisa roja|f; dress|vestido|m; hat|sombrero|m; signal|señal|f; battery|batería|f;
        dice set|juego de dados|m; mattress|colchón|m; umbrella|paraguas|m; screen|pantalla|f; elevator|elevador|m;
        update|actualización|f; sensor|sensor|m; motor|motor|m; piano|piano|m; drum|tambor|m
    """,
    "person": """
        boss|jefe|m; teacher|maestra|f; doctor|doctor|m; waiter|mesero|m; driver|chofer|m; coach|entrenador|m;
        singer|cantante|f; neighbor|vecino|m; actor|actor|m; chef|chef|m; nurse|enfermera|f; director|director|m;
        clerk|cajero|m; manager|gerente|f; roommate|compañera|f; guide|guía|m; dentist|dentista|m; band|banda|f;
        team|equipo|m; barber|barbero|m; tutor|tutor|m; host|anfitrión|m; professor|profesor|m; poet|poeta|m;
        referee|árbitro|m
    """,
    "kin": """
        sister|hermana|f; brother|hermano|m; mom|mamá|f; dad|papá|m; cousin|primo|m; aunt|tía|f; grandma|abuela|f;
        grandpa|abuelo|m; friend|amigo|m; son|hijo|m; daughter|hija|f; uncle|tío|m; roomie|compa|m; wife|esposa|f;
        husband|esposo|m; nephew|sobrino|m; niece|sobrina|f; godmother|madrina|f
    """,
}

_NAMES = """
    Sofía; Mateo; Valentina; Diego; Camila; Andrés; Lucía; Joaquín; Emily; Tyler; Jasmine; Kevin; Ashley; Brandon;
    Megan; Carlos; Rosa; Sol; Mercedes; Victoria; Grace; Hope; Paz; Luna; Ángel; Summer; Dolores; Faith; Rico; Max;
    Alma; Estrella; Dawn; Blanca; Linda
"""
_PLACES = """
    Monterrey; San Antonio; El Paso; Miami; Bogotá; Houston; Guadalajara; Chicago; Santo Domingo; Los Ángeles; Phoenix;
    San Juan; Tijuana; Laredo; Lima; Buenos Aires; Dallas; La Paz; Mérida; Brooklyn; Fresno; Puebla; Santa Fe; Reno;
    Toluca; Denver
"""
_BRANDS = """
    Los Cometas; Velvet Cactus; Radio Norte; Nopal Coffee; Blue Heron; Tres Lunas; La Onda; Casa Sol; Metro Uno;
    Real Sierra; El Faro; Red Lantern; Once Gatos; Total Gym; Panda Stop; Nova Airlines; Café Central; The Big Pan;
    Dos Ríos; Sunny Van Tours
"""
_TIMES = """
    today|hoy; yesterday|ayer; tonight|esta noche; last night|anoche; this morning|esta mañana;
    last week|la semana pasada; on Monday|el lunes; on Friday|el viernes; on Sunday|el domingo;
    right now|ahora mismo; this weekend|este fin de semana; after work|después del trabajo; at ten|a las diez;
    at eleven|a las once; before class|antes de clase; once again|otra vez; every day|todos los días;
    in the end|al fin; for once|por fin; at noon|al mediodía; since April|desde abril; so far|hasta ahora
"""


def _parse_nouns(block: str) -> list[Noun]:
    """Read `english|spanish|gender` entries separated by semicolons."""
    fields = [entry.strip().split("|") for entry in block.split(";")]
    return [Noun(en, es, gender == "f") for en, es, gender in fields]


def parse_pairs(block: str) -> list[tuple[str, str]]:
    """Read `english|spanish` entries separated by semicolons."""
    fields = [entry.strip().split("|") for entry in block.split(";")]
    return [(en, es) for en, es in fields]


NOUNS = {kind: _parse_nouns(block) for kind, block in _NOUNS.items()}
NAMES, PLACES, BRANDS = ([name.strip() for name in block.split(";")] for block in (_NAMES, _PLACES, _BRANDS))
WHEN = parse_pairs(_TIMES)
