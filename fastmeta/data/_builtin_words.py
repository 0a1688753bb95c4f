"""Words and sentence frames of the built-in data set."""

# action -> ways to say it; each fits before "the <object>" and before "it"
ACTIONS: dict[str, tuple[str, ...]] = {
    "create": ("create", "set up", "make", "add", "put in", "prepare"),
    "remove": ("remove", "delete", "cancel", "get rid of", "drop", "erase"),
    "change": ("change", "edit", "update", "modify", "adjust", "correct"),
    "show": ("show", "display", "bring up", "pull up", "open", "let me see"),
    "share": ("share", "send", "forward", "pass on", "hand over", "give out"),
    "find": ("find", "look up", "search for", "locate", "track down", "look for"),
    "pause": ("pause", "stop", "hold", "suspend", "freeze", "halt"),
    "resume": ("resume", "continue", "restart", "go on with", "carry on with", "reopen"),
    "save": ("save", "keep", "store", "bookmark", "archive", "hang on to"),
    "explain": ("explain", "describe", "tell me about", "inform me about", "walk me through",
                "say more about"),
}  # fmt: skip

# domain -> object -> ways to name it
OBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "calendar": {
        "meeting": ("meeting", "appointment", "conference", "get together"),
        "reminder": ("reminder", "memo", "note", "heads up"),
        "birthday": ("birthday", "party", "celebration", "anniversary"),
    },
    "clock": {
        "alarm": ("alarm", "wake up call", "alarm clock", "morning bell"),
        "timer": ("timer", "countdown", "stopwatch", "egg clock"),
    },
    "music": {
        "song": ("song", "track", "tune", "melody"),
        "playlist": ("playlist", "mix", "set list", "album"),
        "concert": ("concert", "gig", "live show", "performance"),
    },
    "mail": {
        "email": ("email", "mail", "letter", "message"),
        "contact": ("contact", "phone number", "address", "business card"),
    },
    "shop": {
        "order": ("order", "purchase", "delivery", "package"),
        "cart": ("shopping list", "cart", "basket", "grocery list"),
        "voucher": ("voucher", "coupon", "gift card", "discount code"),
    },
    "bank": {
        "payment": ("payment", "transfer", "transaction", "deposit"),
        "card": ("credit card", "debit card", "visa", "bank card"),
    },
    "travel": {
        "flight": ("flight", "plane ticket", "air fare", "trip by plane"),
        "hotel": ("hotel", "room", "lodging", "suite"),
        "ride": ("taxi", "cab", "ride", "car service"),
    },
    "home": {
        "light": ("light", "lamp", "bulb", "lighting"),
        "heating": ("heating", "thermostat", "heater", "radiator"),
    },
    "kitchen": {
        "recipe": ("recipe", "dish", "cooking instructions", "menu"),
        "table": ("restaurant booking", "table", "dinner reservation", "place to eat"),
    },
    "media": {
        "film": ("film", "movie", "video", "motion picture"),
        "photo": ("photo", "picture", "snapshot", "image"),
    },
}

FRAMES: tuple[str, ...] = (
    "{verb} {thing}",
    "{verb} {thing} {context}",
    "{context} {verb} {thing}",
    "can you {verb} {thing} {context}",
    "could you {verb} {thing}",
    "i want you to {verb} {thing} {context}",
    "i would like to {verb} {thing}",
    "i need to {verb} {thing} {context}",
    "is it possible to {verb} {thing}",
    "help me {verb} {thing} {context}",
    "it is time to {verb} {thing}",
    "how do i {verb} {thing}",
    "about {thing} {context} : {verb} it",
    "there is {thing} {context} and i want to {verb} it",
    "you know {thing} ? {verb} it",
    "do not forget to {verb} {thing} {context}",
)

DETERMINERS: tuple[str, ...] = (
    "the", "my", "our", "that", "this", "the new", "my old", "the next", "my last", "the first",
    "the other", "our big", "that small", "the best",
)  # fmt: skip

CONTEXTS: tuple[str, ...] = (
    "for tomorrow", "for today", "from yesterday", "on monday", "on friday", "next week",
    "this evening", "in the morning", "at noon", "at five", "before lunch", "after work",
    "with anna", "with my brother", "for john", "for the kids", "from maria", "at the office",
    "in the kitchen", "upstairs", "in paris", "in london", "on my phone", "for the team",
    "for two people", "right now", "later", "for the weekend",
)  # fmt: skip

BEFORE: tuple[str, ...] = (
    "", "", "", "", "please", "hey", "hello", "ok", "well", "listen", "so", "quick question",
)  # fmt: skip

AFTER: tuple[str, ...] = (
    "", "", "", "", "please", "thanks", "thank you", "if you can", "as soon as possible", "again",
    "for me", "will you",
)  # fmt: skip
