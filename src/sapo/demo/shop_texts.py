"""The parts that `sapo.demo.house_style` puts conversations together from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Topic:
    """Wordings of one concern; `{product}` stands for a lamp.

    Attributes:
        questions: what customers ask; the last wording is kept for evaluation.
        answers: first sentences of an answer.
        more: second sentences, which an answer may have.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    more: tuple[str, ...]


PRODUCTS: Final = (
    "desk lamp", "floor lamp", "reading lamp", "bedside lamp", "pendant light", "garden lantern", "paper shade",
    "wall light", "brass lamp", "clip-on light", "night light", "tripod lamp", "glass lamp", "string of lights",
)  # fmt: skip

NAMES: Final = (
    "Mira", "Jonas", "Priya", "Tomas", "Aisha", "Ben", "Clara", "Diego", "Elif", "Felix", "Grace", "Hana", "Ivan",
    "Julia", "Kofi", "Lena", "Marco", "Nadia", "Oscar", "Paula", "Rosa", "Samir", "Tess", "Victor", "Wanda", "Yusuf",
)  # fmt: skip

OPENINGS: Final = (
    "Hi there.", "Good morning!", "Good evening.", "Hello team,", "Hey,", "Dear Larkspur team,", "A quick question.",
    "Sorry to bother you.", "I hope you can help.", "To whom it may concern:",
)  # fmt: skip

ORDERS: Final = (
    "My order is {order}.", "Order number {order}.", "This is about order {order}.", "(Order {order})",
    "You will find it under {order}.", "The receipt says {order}.", "It is order no. {order}.",
    "The number on the box is {order}.", "Ref: {order}.",
)  # fmt: skip

BACKGROUNDS: Final = (
    "I moved into a small flat last month.", "It was meant as a birthday present for my sister.",
    "I have bought from you twice before and was always happy.", "My office is rather dark in winter.",
    "We are redecorating the whole living room at the moment, so everything is a bit of a mess.",
    "A friend told me about your shop.", "I already looked at your website but could not find an answer there.",
    "My father is eighty and reads a lot at night.", "The rest of the parcel was fine, thank you.",
    "I called last week, but nobody picked up.", "There is no hurry, I am only planning ahead.",
    "Please be quick, I leave for a trip on Friday.", "The children are fighting over it already.",
    "Our cat has strong opinions about lamps, as you can imagine.",
)  # fmt: skip

SIGNATURES: Final = ("Thanks, {name}", "Best, {name}", "Regards, {name}", "{name}", "Cheers, {name}", "Yours, {name}")

TICKETS: Final = (
    "Your ticket is {ticket}.", "We filed this under ticket {ticket}.",
    "Please quote ticket {ticket} if you write again.",
    "You can follow it under ticket {ticket}.",
)  # fmt: skip

TOPICS: Final = {
    "late parcel": Topic(
        (
            "My {product} should have been here a week ago.", "Where is my {product}? The tracking page has not moved.",
            "I am still waiting for the {product} I paid for.", "When will the {product} arrive?",
            "It has been ten days and there is no sign of the {product}.",
        ),
        (
            "We are sorry that the {product} is late and have asked the carrier to look for it today.",
            "The parcel with your {product} left our workshop and should reach you within two days.",
            "Your {product} was held up at the depot and is moving again.",
        ),
        (
            "If it is not there by Thursday, we send a new one.",
            "The tracking page will show the new date this evening.",
            "We will pay the postage back to you.",
        ),
    ),
    "broken on arrival": Topic(
        (
            "The {product} arrived with a crack.", "When I opened the box, the {product} was in pieces.",
            "One corner of the {product} is badly dented.", "My {product} came damaged. What now?",
            "I unpacked the {product} and the glass had shattered.",
        ),
        (
            "We are sorry about the damage and will send you a new {product} tomorrow.",
            "A replacement for the broken {product} is being packed today.",
            "That should not happen, and a new {product} is on its way at our cost.",
        ),
        ("You can throw the broken one away.", "A photo of the box would help us.", "You need not send anything back."),
    ),
    "does not work": Topic(
        (
            "The {product} does not switch on.", "My {product} flickers all the time.",
            "After two evenings the {product} stopped working.", "The {product} hums whenever it is on.",
            "I plug in the {product} and nothing happens at all.",
        ),
        (
            "Please try another bulb first, since that solves most cases with this {product}.",
            "This sounds like a loose contact, and we will repair the {product} free of charge.",
            "Please unplug the {product} for ten minutes and then try it once more.",
        ),
        (
            "If that does not help, we will exchange it.",
            "A repair takes about five working days.",
            "The label for the parcel is in your mailbox.",
        ),
    ),
    "return": Topic(
        (
            "I would like to send the {product} back.", "How do I return the {product}?",
            "The {product} does not suit the room. Can I give it back?", "Is it still possible to return my {product}?",
            "I changed my mind about the {product} and want to return it.",
        ),
        (
            "You can return the {product} within thirty days, used or not.",
            "We gladly take the {product} back and have sent you a label by mail.",
            "Please pack the {product} in its box and hand it in at any post office.",
        ),
        (
            "The money is back in your account within a week.",
            "Sending it back costs you nothing.",
            "Any sturdy box will do.",
        ),
    ),
    "refund": Topic(
        (
            "I sent the {product} back, but my money is not here yet.", "When do I get the refund for the {product}?",
            "You promised to pay back the {product}.", "The refund for my {product} seems to be missing.",
            "It is three weeks since I returned the {product}, and I have not seen a cent.",
        ),
        (
            "The refund for the {product} was sent this morning.",
            "We received the {product} and will pay it back by tomorrow evening.",
            "Our bank had a delay, and the money for the {product} is now on its way.",
        ),
        ("Banks need up to three days.", "We are sorry that you had to wait.", "It goes to the card you paid with."),
    ),
    "wrong item": Topic(
        (
            "I ordered a {product} and got something else.",
            "There was the wrong lamp in my parcel instead of the {product}.",
            "This is not the {product} that I chose.", "You sent me two left feet for the {product}.",
            "I opened my parcel and found a different lamp where the {product} should be.",
        ),
        (
            "We mixed up two parcels, and the right {product} leaves today.",
            "That was our mistake, and your {product} will be with you on Wednesday.",
            "The correct {product} is reserved for you and goes out this afternoon.",
        ),
        (
            "Our driver collects the other lamp when he comes.",
            "Please keep the wrong one as an apology.",
            "We put a spare bulb in the parcel.",
        ),
    ),
    "new address": Topic(
        (
            "Please send the {product} to my office instead.", "I have moved. Can the {product} go to another address?",
            "There is a mistake in the address for my {product}.", "Can you change where the {product} is delivered?",
            "I typed the wrong street for the {product}. Can that be corrected?",
        ),
        (
            "We can change the address of the {product} until noon on the day it leaves.",
            "Please reply with the new address, and we will redirect the {product}.",
            "The {product} has not left yet, so a new address is no problem.",
        ),
        (
            "The date of delivery stays the same.",
            "There is no charge for it.",
            "A neighbour's address works as well.",
        ),
    ),
    "cancel": Topic(
        (
            "Please cancel the {product}.", "I ordered the {product} twice by accident.",
            "Can I still stop the order of the {product}?", "I no longer need the {product}.",
            "My partner already bought a {product}, so please cancel mine.",
        ),
        (
            "We have cancelled the {product} and nothing will be charged.",
            "The {product} has already left, so please refuse the parcel at the door.",
            "Your order of the {product} is stopped.",
        ),
        (
            "You get a note by mail in a few minutes.",
            "You are welcome back at any time.",
            "The money was never taken from your card.",
        ),
    ),
    "bulb": Topic(
        (
            "Which bulb fits the {product}?", "What bulbs do I need for my {product}?",
            "How bright may the bulb in the {product} be?", "Does the {product} take an ordinary bulb?",
            "The bulb of the {product} died. What do I replace it with?",
        ),
        (
            "The {product} takes any E27 bulb of up to eight watts.",
            "A small E14 bulb with warm light suits the {product} best.",
            "The light of the {product} is built in and lasts about fifteen years.",
        ),
        ("Warm white is the kindest to the eyes.", "We sell them in pairs.",
            "Please let it cool down before the change."),
    ),
    "cleaning": Topic(
        (
            "How do I clean the {product}?", "There is a stain on my {product}.",
            "Can I wash the shade of the {product}?", "What removes dust from the {product}?",
            "My {product} got sticky in the kitchen. How can I clean it?",
        ),
        (
            "Please unplug the {product} and wipe it with a dry cloth.",
            "A soft brush is enough for the {product}.",
            "A little soapy water on a cloth is safe for the {product}.",
        ),
        ("Please avoid anything with alcohol.", "Let it dry for an hour.", "Once a month is plenty."),
    ),
    "invoice": Topic(
        (
            "I need an invoice for the {product}.", "Could you put my company on the bill for the {product}?",
            "The invoice for the {product} got lost.", "Where can I download the bill for the {product}?",
            "My accountant asks for a receipt for the {product}.",
        ),
        (
            "The invoice for the {product} is attached to this mail.",
            "We have sent a new bill for the {product} to your address.",
            "You find the bill for the {product} in your account under orders.",
        ),
        ("It shows the tax separately.", "Just tell us if the name has to change.", "It is valid without a signature."),
    ),
    "warranty": Topic(
        (
            "How long is the warranty on the {product}?", "Is my {product} still under warranty?",
            "The warranty card of the {product} is gone.", "Does the warranty cover the cable of the {product}?",
            "Who pays for the repair if the {product} fails next year?",
        ),
        (
            "The warranty on the {product} runs for three years from the day you bought it.",
            "Your {product} is covered until the end of next year.",
            "You need no card, since we keep the date for the {product} here.",
        ),
        ("The cable and the switch are covered too.", "A repair is free in that time.", "Bulbs are not part of it."),
    ),
    "missing part": Topic(
        (
            "The screws for the {product} are missing.", "There was no cable with the {product}.",
            "My {product} came without the shade ring.", "A part of the {product} is not in the box.",
            "I cannot put the {product} together because a bracket is missing.",
        ),
        (
            "The missing part of the {product} goes out by letter today.",
            "We are sorry, and a full set for the {product} is on its way.",
            "Please look under the foam in the box first, where the small parts of the {product} hide.",
        ),
        ("It should be with you in two days.", "No tools are needed.", "Please tell us if anything else is missing."),
    ),
    "assembly": Topic(
        (
            "I cannot get the {product} together.", "How is the {product} mounted?",
            "The manual for the {product} makes no sense to me.", "Which way round does the foot of the {product} go?",
            "Step four of the manual for the {product} has me stuck.",
        ),
        (
            "Please fix the foot of the {product} first and tighten the pole last.",
            "There is a short film about the {product} on our website.",
            "The flat side of the ring on the {product} points down.",
        ),
        ("It takes about ten minutes.", "A second pair of hands helps.", "Call us and we will do it together."),
    ),
    "colour": Topic(
        (
            "Does the {product} come in green?", "The {product} is darker than in the picture.",
            "Can I swap my {product} for a white one?", "Which colours of the {product} do you have?",
            "Is there a blue version of the {product}?",
        ),
        (
            "The {product} comes in white, green and black.",
            "We can exchange your {product} for another colour free of charge.",
            "Every {product} is painted by hand, so shades differ a little.",
        ),
        ("We can send you a sample card.", "Green is back in March.", "Black is the most popular one."),
    ),
    "voucher": Topic(
        (
            "My voucher was not taken off the price of the {product}.", "The code for the {product} does not work.",
            "Can I still use a voucher for the {product}?", "I forgot to enter my code when I bought the {product}.",
            "The checkout refused my gift card for the {product}.",
        ),
        (
            "We have taken the voucher off the price of the {product}.",
            "The code had expired, but we accept it for the {product} all the same.",
            "Your voucher for the {product} is still good until June.",
        ),
        ("The difference is paid back to you.", "One code counts for one order.", "Thank you for telling us."),
    ),
}  # fmt: skip

UNSEEN_TOPICS: Final = {
    "opening hours": Topic(
        (
            "Can I pick up the {product} on Saturday?", "Until when is your shop open today?",
            "Is there a shop where I can look at the {product}?",
        ),
        ("Our shop is open from nine to six, and until two on Saturdays.",),
        ("We look forward to your visit.",),
    ),
    "dimmer": Topic(
        (
            "Can the {product} be dimmed?", "Does the {product} work with a wall dimmer?",
            "The {product} is too bright at night. Can I turn it down?",
        ),
        ("The {product} can be dimmed with any bulb that allows it.",),
        ("A dimmer is in our shop.",),
    ),
    "outdoors": Topic(
        (
            "May the {product} stand on the balcony?", "Is the {product} safe in the rain?",
            "Can I leave the {product} outside in winter?",
        ),
        ("The {product} may stand outside under a roof.",),
        ("Please bring it in when it freezes.",),
    ),
    "password": Topic(
        (
            "I cannot log in to my account any more.", "Your website says that my password is wrong.",
            "How do I reset the password of my account?",
        ),
        ("We have sent you a link for a new password.",),
        ("The link works for one hour.",),
    ),
    "large order": Topic(
        (
            "Our hotel needs forty of the {product}. Is there a better price?", "Do you give a discount for ten lamps?",
            "We would like to order the {product} for a whole school.",
        ),
        ("From ten lamps on, the {product} is fifteen percent cheaper.",),
        ("Delivery is free then.",),
    ),
}  # fmt: skip
