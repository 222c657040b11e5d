"""What `eagle-fast bench` measures where no file of prompts is named: short, and of many kinds."""

PROMPTS = (
    "Explain to a ten-year-old why the moon changes its shape.",
    "Write a Python function that merges two sorted lists, with a docstring and two examples.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show how you get there.",
    "List six things to check before renting a flat, one line each.",
    "Write a polite email that moves a meeting from Tuesday to Thursday afternoon.",
    "Summarize in three sentences how bread is made, from grain to loaf.",
    "What is the difference between a virus and a bacterium?",
    "Tell a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write an SQL query that gives the five customers with the largest total of orders, and explain each clause.",
    "Give the pros and cons of working from home as a table in Markdown.",
    "Translate into French, German and Spanish: The library opens at eight in the morning.",
    "I have eggs, rice, spinach and an onion. Suggest a dinner, with steps and times.",
)
