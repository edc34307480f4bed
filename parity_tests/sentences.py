"""Real sentences of different lengths, for the real weights."""

SIMILAR = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
"""The three of the sentence-transformers documentation, whose similarities are published."""

SENTENCES = (
    *SIMILAR,
    "Hello.",
    "Why?",
    "",
    "A cat sits on the mat.",
    "Yesterday, all my troubles seemed so far away.",
    "The quick brown fox jumps over the lazy dog, again and again, until both of them are tired.",
    "Water boils at 100 °C (212 °F) at sea level, and at 71 °C on the summit of Mount Everest.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows.",
    "We hold these truths to be self-evident, that all men are created equal.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I thought "
    "I would sail about a little and see the watery part of the world.",
    "def add(a, b): return a + b",
    "SELECT name FROM users WHERE age >= 18 ORDER BY name;",
    "¿Dónde está la biblioteca?",
    "Où est passée la clé que j'avais laissée près de l'entrée ?",
    "Die Würde des Menschen ist unantastbar.",
    "吾輩は猫である。名前はまだ無い。",
    "It costs $1,299.99, or €1.199,99, plus 8.5% tax!!!",
    "antidisestablishmentarianism",
    "E = mc²",
    "I can't, won't and shouldn't.",
    "He said: “It’s fine” — and left…",
    "😀 so happy 🎉",
    "The committee, which had met every Tuesday since the spring, adjourned without a decision.",
)
"""Twenty-six of them, from none to thirty words, with padding when they make one batch."""
