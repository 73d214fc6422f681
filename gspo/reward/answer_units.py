"""Know units and scales: `km/h` is `kilometers per hour` is `千米/时`; `12万` is 120000; `3 dozen` is 36."""

import re

_ALIASES = (
    *("mm millimeter millimeters millimetre millimetres 毫米", "cm centimeter centimeters centimetre centimetres 厘米"),
    *("m meter meters metre metres 米", "km kilometer kilometers kilometre kilometres 千米 公里", "dm 分米"),
    *("ft foot feet", "inch inches 英寸", "yd yard yards", "mi mile miles 英里", "kg kilogram kilograms 千克 公斤"),
    *("g gram grams 克", "mg milligram milligrams 毫克", "lb lbs pound pounds 磅", "oz ounce ounces", "t ton tons 吨"),
    *(
        "s sec second seconds 秒",
        "min mins minute minutes 分钟",
        "h hr hrs hour hours 小时",
        "day days 天",
        "week weeks 周",
    ),
    *("month months 个月", "year years", "L l liter liters litre litres 升", "ml mL milliliter milliliters 毫升"),
    *("dollar dollars usd USD", "cent cents", "euro euros", "yuan rmb RMB 元", "degree degrees 度", "mph", "kmh kph"),
    *("N newton newtons 牛", "J joule joules 焦", "W watt watts 瓦", "V volt volts 伏", "Pa", "kPa", "Hz", "kW", "mol"),
)
_CANONICAL = {alias: names.split()[0] for names in _ALIASES for alias in names.split()}
_SINGLE = "mgshLlNJWV"  # letters that are units beside a number; others, as x and n, are variables
_NAME = "|".join(sorted((re.escape(name) for name in _CANONICAL if len(name) > 1), key=len, reverse=True))
_CJK = r"\u4e00-\u9fff"
_ONE = (
    rf"(?:(?:square|sq\.?|cubic|平方|立方) ?)?"
    rf"(?:(?:{_NAME})(?![A-Za-z])|[{_SINGLE}](?![A-Za-z])|[米克秒升元度天周吨牛焦瓦伏])"
)
_POWER = r"(?: ?\^ ?\{? ?-?[123] ?\}?)?"
_UNIT = re.compile(rf" ?({_ONE}{_POWER}(?:(?: ?[/*] ?| per | ?每 ?|(?<=[mh秒时]) )(?:{_ONE}|时|分){_POWER})*)")
_PIECE = re.compile(
    rf"(square|sq\.?|cubic|平方|立方)|(?!per|每)({_NAME}|[A-Za-z{_CJK}])|\^ ?\{{? ?(-?[123])|(/|per|每)"
)
_SCALE = re.compile(
    r" ?(?:(dozen|hundred|thousand|million|billion|trillion)s?\b|([十百千]?[万亿]|百(?!分)|千(?![米克瓦])))",
    re.IGNORECASE,
)
_SCALES = {
    **{"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"百": 100, "千": 1000, "万": 10**4, "亿": 10**8, "十": 10},
}


def take_scale(text: str) -> tuple[int, str]:
    """Return (10000, rest) for `万...`: what the number before is to be multiplied with, and the text after it."""
    factor = 1
    while found := _SCALE.match(text):
        for part in [found[1].lower()] if found[1] else found[2]:
            factor *= _SCALES[part]
        text = text[found.end() :]
    return factor, text


def take_unit(text: str) -> tuple[str, str]:
    """Return (unit in one spelling, rest) of the text after a number; no unit: ("", text)."""
    found = _UNIT.match(text)
    if not found or text[found.end() :].startswith(("^", "(", "\\", "=")):
        return "", text
    return _spell(found[1]), text[found.end() :]


def _spell(unit: str) -> str:
    """Return `m^2` for `square meters`, `mi/h` for `mph`."""
    if unit in ("mph", "kmh", "kph"):
        return {"mph": "mi/h"}.get(unit, "km/h")
    spelled, square, below = [], "", False
    for dimension, name, power, divides in _PIECE.findall(unit):
        if dimension:
            square = "^3" if dimension in ("cubic", "立方") else "^2"
        elif name:
            spelled.append(
                ("/" if below else "") + {"时": "h", "分": "min"}.get(name, _CANONICAL.get(name, name)) + square
            )
            square = ""
        elif power in ("-1", "-2"):  # m s^{-1}
            spelled[-1] = "/" + spelled[-1].lstrip("/") + power[1:].replace("1", "").replace("2", "^2")
        elif power and power != "1":
            spelled[-1] += f"^{power}"
        below = bool(divides)
    return "".join([spelled[0], *(name if name[0] == "/" else f"*{name}" for name in spelled[1:])])
