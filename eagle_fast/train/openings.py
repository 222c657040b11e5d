"""The first words of users' questions, to steer the questions that a target makes up over many topics.

The target goes on from here in its own words. Left alone it mostly asks for short prose; with these a good part of its
questions are about numbers, code, texts to work on, and roles to play, which drafts differently.
"""

MATHS = (
    "A baker makes 24", "A train leaves", "If a car travels", "Maria has 15 apples and", "Tom buys 3 books for",
    "There are 48 students in", "A farmer has", "Each box holds 12", "Anna earns $18 an hour and", "A recipe needs",
    "Last week Peter ran", "A rectangle is", "What is the sum of", "Solve the equation", "Find the value of x if",
    "A shop sells pencils for", "Sarah is twice as old as", "A tank holds 200 liters of water. It",
    "In a class of 30,", "How many ways are there to", "The price of a jacket is", "A team won 14 games and",
    "Jack saves $25 every month.", "Compute the area of", "What percentage of", "A bus ticket costs",
    "Lena reads 20 pages a day.", "If 5 workers can", "Calculate the average of", "David had some marbles. He gave",
    "A garden has 6 rows of", "What is the probability that", "Three friends share", "A phone costs $400, and",
    "Every day a factory produces", "Two numbers add up to", "How long does it take to",
    "A store offers a discount of", "Simplify the expression", "The ratio of boys to girls is",
    "Emma and her brother collect stamps.", "On Monday a library lent out", "A pizza is cut into",
)  # fmt: skip
CODE = (
    "Write a Python function that", "Write a function to", "Write a program that", "Implement a class",
    "Complete this function.\n\ndef", "Complete the function below.\n\n```python\ndef", "Finish this code:\n\ndef",
    "Fill in the body of the function.\n\nfrom typing import List\n\n\ndef", "Write the missing code.\n\ndef is_",
    "Complete this Python function:\n\ndef count_", "Continue the code.\n\ndef find_", "Complete it:\n\ndef get_",
    "Here is a function signature and its docstring. Write the body.\n\ndef", "def sum_of_", "def sort_by_",
    "def remove_", "def max_", "def", "import math\n\n\ndef", "from typing import List, Tuple\n\n\ndef",
    "Fix the bug in this code:\n\n", "What does this code do?\n\n```python\n", "Explain this code:\n\n",
    "How do I reverse a string in", "Write a SQL query", "Write a JavaScript function", "Write an HTML page",
    "Implement binary search", "How can I sort a list of", "Write a Java method", "Write a unit test for",
    "Write a regular expression that", "Rewrite this loop as", "Given a list of integers,", "Given a string s,",
    "Write a recursive function", "Create a Python script that", "How do I read a file in", "Write a bash script",
    "What is the time complexity of", "Check whether a number is",
)  # fmt: skip
REASONING = (
    "Which is heavier,", "If all cats are animals and", "Five friends sit in a row.", "My cousin is older than",
    "Is it true that", "Which of these words rhyme:", "What comes next in the sequence",
    "A clock shows a quarter past three.", "Why does", "What would happen if", "Suppose that",
    "Two doors stand before you.", "Compare", "Who is taller if", "Which of these is larger:", "Here is a riddle:",
    "You have a 3 liter jug and", "Put these events in order:", "Argue for and against",
    "What is the difference between", "If it takes 3 minutes to",
)  # fmt: skip
EXTRACTION = (
    "Read the following text and", "Summarize the following paragraph:\n\n", "Extract the names from this text:\n\n",
    "List all dates in the following passage.\n\n", "Classify the following reviews as",
    "Decide which of these headlines", "Here is an email:\n\n", "Translate this sentence into",
    "Turn the following notes into a table:\n\n", "Return the answer as JSON.\n\n",
    "Put each of these items into a group:", "Rewrite the following sentence", "Correct the grammar:",
    "What is the sentiment of", "Based on the passage below,", "Find the main idea of this article:\n\n",
    "Make this text shorter:\n\n", "From the data below,", "Paraphrase the following:",
    "Which of these sentences mentions", "Point out the mistakes in", "Which cities are named in",
)  # fmt: skip
WRITING = (
    "Write a short story about", "Write a poem about", "Write an email to", "Draft a letter",
    "Write a blog post about", "Describe the view from", "Write a product description for", "Compose a speech",
    "Write an essay on", "Tell me a story in which", "Write a headline for", "Write a diary entry of",
    "Write a dialogue between", "Write a review of", "Create an outline", "Write an introduction for",
    "Give me a catchy title for", "Write a song about", "Write an advertisement for", "Write a toast for",
    "Write a script for", "Write a one-page summary of", "Write a fable about",
)  # fmt: skip
ROLES = (
    "Pretend you are", "You are a doctor.", "Be my tour guide through", "Imagine you are a time traveler",
    "Talk to me like", "You are a teacher explaining", "Pretend to be", "Speak like a pirate and", "You are a famous",
    "As a detective,", "Play the part of", "Let us play a game:", "You are the captain of", "From now on you are",
    "Take on the persona of", "Answer as if you were", "You are an interviewer.", "I want you to act as",
)  # fmt: skip
KNOWLEDGE = (
    "What is", "What are the main causes of", "Explain how", "How does a", "Describe the structure of", "Who was",
    "Why is the sky", "What are the stages of", "Explain the concept of", "What do we know about black holes",
    "How do plants", "What happens inside a cell when", "Describe the process of", "Explain in simple terms",
    "What role does", "How do vaccines", "What is the function of", "Give examples of", "What were the effects of",
    "Discuss the history of", "How did the Roman", "Explain the theory of", "What is the relationship between",
    "How are mountains", "How do economists", "What ethical questions", "Name the planets", "What causes an",
    "How does a bill become", "What is machine learning and", "Outline the key events of", "How is electricity",
)  # fmt: skip
PRACTICAL = (
    "How can I", "Give me tips for", "What should I", "Plan a trip to", "Create a weekly", "Suggest a",
    "I need help with", "Can you recommend", "How do I cook", "Make a list of", "My friend", "What is the best way to",
    "Give me a recipe for", "I have an interview", "Design a", "Help me", "Hi, can you", "Let's talk about",
    "I am learning", "Give three reasons", "What are some good", "Could you explain", "I want to start", "Please",
    "Is it safe to",
)  # fmt: skip

OPENINGS = (*MATHS, *CODE, *REASONING, *EXTRACTION, *WRITING, *ROLES, *KNOWLEDGE, *PRACTICAL)
