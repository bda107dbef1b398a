"""Text of general knowledge, of our own, to see what an unlearning took along: common facts in plain sentences."""

from __future__ import annotations

__all__ = ["GENERAL_QUESTIONS", "GENERAL_TEXTS"]

GENERAL_TEXTS = (
    "The sun rises in the east and sets in the west. At noon it stands highest in the sky, and shadows are short.",
    "Water freezes at zero degrees Celsius and boils at one hundred. Ice is lighter than water, so it floats.",
    "A week has seven days, and a year has twelve months. Every fourth year February has one day more.",
    "Paris is the capital of France. The river Seine flows through it, and the Eiffel Tower stands near the river.",
    "Bees collect nectar from flowers and make honey of it. On their way they carry pollen from plant to plant.",
    "To make bread, mix flour, water, salt and yeast. Let the dough rise, and bake it in a hot oven until brown.",
    "The heart pumps blood through the body. Arteries carry it away from the heart, and veins carry it back.",
    "Two and two make four. If you have ten apples and give three of them away, seven apples are left.",
    "Light travels faster than sound. That is why you see the lightning before you hear the thunder.",
    "Trees take carbon dioxide from the air and give off oxygen. In autumn many of them lose their leaves.",
    "The moon moves around the Earth in about a month. It shines because it reflects the light of the sun.",
    "Shakespeare wrote plays such as Hamlet and Romeo and Juliet. They are still performed all over the world.",
    "When it rains, streets become wet and slippery. Drivers should slow down and keep a longer distance.",
    "A triangle has three sides, and a square has four. The angles of a triangle add up to 180 degrees.",
    "Cats like to sleep during the day and hunt at night. They see well in the dark and land on their feet.",
    "The library is open from Monday to Friday. You can borrow books for three weeks and bring them back at the desk.",
)

GENERAL_QUESTIONS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "At which temperature does water freeze?",
    "What do bees make of nectar?",
    "Which planet do we live on?",
    "What is the largest ocean?",
    "Who wrote Romeo and Juliet?",
    "How many sides does a triangle have?",
    "What do plants need to grow?",
    "Why is the sky blue?",
    "How do you boil an egg?",
    "What is a dictionary for?",
    "Which season follows winter?",
    "What is the opposite of hot?",
    "How does a bicycle work?",
    "Name three musical instruments.",
    "What does a doctor do?",
    "Explain what rain is.",
    "What is the sum of seven and five?",
    "Which animals lay eggs?",
    "What is bread made of?",
    "Why do people sleep?",
    "Name four colours.",
    "What is a map used for?",
)
