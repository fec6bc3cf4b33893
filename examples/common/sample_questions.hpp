// Simple questions on five subjects, four answers each: what evaluate --choices sample asks, in the format that it reads. Ten of each subject to
// ask, five more to show before them; every letter is right as often as any other, but for the remainder.
#pragma once

#include <string_view>

namespace qdylora::examples {

inline constexpr std::string_view sample_questions = R"({"subject": "astronomy", "question": "Which planet is closest to the Sun?", "choices": ["Venus", "Jupiter", "Mercury", "Mars"], "answer": "C"}
{"subject": "astronomy", "question": "Which planet is the largest of the solar system?", "choices": ["Jupiter", "Neptune", "Saturn", "Earth"], "answer": "A"}
{"subject": "astronomy", "question": "What does the Moon orbit?", "choices": ["The Sun", "The Earth", "Mars", "Venus"], "answer": "B"}
{"subject": "astronomy", "question": "How long does the Earth take to go once around the Sun?", "choices": ["About ten years", "About one day", "About one month", "About one year"], "answer": "D"}
{"subject": "astronomy", "question": "What is the Sun?", "choices": ["A planet", "A moon", "A star", "A comet"], "answer": "C"}
{"subject": "astronomy", "question": "Which planet is known for its bright, wide rings?", "choices": ["Mercury", "Venus", "Mars", "Saturn"], "answer": "D"}
{"subject": "astronomy", "question": "Which planet is called the Red Planet?", "choices": ["Uranus", "Venus", "Saturn", "Mars"], "answer": "D"}
{"subject": "astronomy", "question": "What force keeps the planets in their orbits?", "choices": ["Air pressure", "Friction", "Gravity", "Magnetism"], "answer": "C"}
{"subject": "astronomy", "question": "Who was the first person to walk on the Moon?", "choices": ["Neil Armstrong", "Yuri Gagarin", "Galileo Galilei", "John Glenn"], "answer": "A"}
{"subject": "astronomy", "question": "What is the galaxy called that contains the solar system?", "choices": ["The Large Magellanic Cloud", "The Sombrero Galaxy", "Andromeda", "The Milky Way"], "answer": "D"}
{"subject": "biology", "question": "Which organ pumps blood through the human body?", "choices": ["The lungs", "The liver", "The heart", "The stomach"], "answer": "C"}
{"subject": "biology", "question": "What gas do plants take in for photosynthesis?", "choices": ["Nitrogen", "Carbon dioxide", "Methane", "Helium"], "answer": "B"}
{"subject": "biology", "question": "What molecule carries genetic information in cells?", "choices": ["DNA", "Cholesterol", "Water", "Glucose"], "answer": "A"}
{"subject": "biology", "question": "How many legs does an insect have?", "choices": ["Four", "Six", "Ten", "Eight"], "answer": "B"}
{"subject": "biology", "question": "Which of these animals is a mammal?", "choices": ["The crocodile", "The shark", "The frog", "The whale"], "answer": "D"}
{"subject": "biology", "question": "What pigment makes leaves green?", "choices": ["Melanin", "Hemoglobin", "Chlorophyll", "Keratin"], "answer": "C"}
{"subject": "biology", "question": "Which part of the human body breaks food down with acid?", "choices": ["The brain", "The kidney", "The heart", "The stomach"], "answer": "D"}
{"subject": "biology", "question": "Which blood cells carry oxygen?", "choices": ["Red blood cells", "Nerve cells", "White blood cells", "Platelets"], "answer": "A"}
{"subject": "biology", "question": "What do bees collect from flowers to make honey?", "choices": ["Leaves", "Bark", "Seeds", "Nectar"], "answer": "D"}
{"subject": "biology", "question": "Who wrote On the Origin of Species?", "choices": ["Albert Einstein", "Charles Darwin", "Louis Pasteur", "Isaac Newton"], "answer": "B"}
{"subject": "chemistry", "question": "What is the chemical formula of water?", "choices": ["NaCl", "H2O", "O2", "CO2"], "answer": "B"}
{"subject": "chemistry", "question": "What is the chemical symbol of gold?", "choices": ["Au", "Fe", "Pb", "Ag"], "answer": "A"}
{"subject": "chemistry", "question": "Which element has the atomic number 1?", "choices": ["Hydrogen", "Carbon", "Iron", "Oxygen"], "answer": "A"}
{"subject": "chemistry", "question": "Which gas makes up most of the Earth's air?", "choices": ["Oxygen", "Carbon dioxide", "Nitrogen", "Argon"], "answer": "C"}
{"subject": "chemistry", "question": "At what temperature does water boil at sea level?", "choices": ["50 degrees Celsius", "100 degrees Celsius", "200 degrees Celsius", "0 degrees Celsius"], "answer": "B"}
{"subject": "chemistry", "question": "What is table salt made of?", "choices": ["Sodium and chlorine", "Calcium and sulfur", "Iron and oxygen", "Carbon and hydrogen"], "answer": "A"}
{"subject": "chemistry", "question": "Which particle of an atom has a negative charge?", "choices": ["The electron", "The neutron", "The proton", "The nucleus"], "answer": "A"}
{"subject": "chemistry", "question": "What is a liquid with a pH of 2?", "choices": ["A base", "A metal", "Neutral", "An acid"], "answer": "D"}
{"subject": "chemistry", "question": "What is diamond made of?", "choices": ["Carbon", "Sulfur", "Iron", "Silicon"], "answer": "A"}
{"subject": "chemistry", "question": "What forms when iron reacts with oxygen and water?", "choices": ["Sugar", "Glass", "Rust", "Salt"], "answer": "C"}
{"subject": "geography", "question": "What is the capital of France?", "choices": ["Paris", "Madrid", "Rome", "Lyon"], "answer": "A"}
{"subject": "geography", "question": "What is the capital of Japan?", "choices": ["Beijing", "Tokyo", "Seoul", "Bangkok"], "answer": "B"}
{"subject": "geography", "question": "On which continent is Egypt?", "choices": ["South America", "Australia", "Africa", "Europe"], "answer": "C"}
{"subject": "geography", "question": "Which ocean lies between Europe and North America?", "choices": ["The Arctic Ocean", "The Atlantic Ocean", "The Indian Ocean", "The Pacific Ocean"], "answer": "B"}
{"subject": "geography", "question": "What is the highest mountain above sea level?", "choices": ["Kilimanjaro", "Mount Everest", "Mont Blanc", "Mount Fuji"], "answer": "B"}
{"subject": "geography", "question": "Which river flows through London?", "choices": ["The Danube", "The Nile", "The Seine", "The Thames"], "answer": "D"}
{"subject": "geography", "question": "Which country has the city of Rio de Janeiro?", "choices": ["Mexico", "Argentina", "Brazil", "Spain"], "answer": "C"}
{"subject": "geography", "question": "Which is the largest ocean?", "choices": ["The Southern Ocean", "The Atlantic Ocean", "The Pacific Ocean", "The Indian Ocean"], "answer": "C"}
{"subject": "geography", "question": "What is the capital of Canada?", "choices": ["Toronto", "Vancouver", "Ottawa", "Montreal"], "answer": "C"}
{"subject": "geography", "question": "Which desert covers much of North Africa?", "choices": ["The Gobi", "The Mojave", "The Atacama", "The Sahara"], "answer": "D"}
{"subject": "history", "question": "In which year did the Second World War end?", "choices": ["1939", "1963", "1945", "1918"], "answer": "C"}
{"subject": "history", "question": "Who was the first president of the United States?", "choices": ["Thomas Jefferson", "George Washington", "Benjamin Franklin", "Abraham Lincoln"], "answer": "B"}
{"subject": "history", "question": "Who reached the Americas in 1492 on a voyage for Spain?", "choices": ["James Cook", "Marco Polo", "Vasco da Gama", "Christopher Columbus"], "answer": "D"}
{"subject": "history", "question": "Which people built the pyramids of Giza?", "choices": ["The Egyptians", "The Aztecs", "The Vikings", "The Romans"], "answer": "A"}
{"subject": "history", "question": "Which wall divided a German city until 1989?", "choices": ["The Great Wall", "The Berlin Wall", "The Western Wall", "Hadrian's Wall"], "answer": "B"}
{"subject": "history", "question": "In which city was Julius Caesar killed?", "choices": ["Rome", "Alexandria", "Carthage", "Athens"], "answer": "A"}
{"subject": "history", "question": "What did Johannes Gutenberg bring to Europe in the 15th century?", "choices": ["The telescope", "Printing with movable type", "The steam engine", "Gunpowder"], "answer": "B"}
{"subject": "history", "question": "Which ship sank in 1912 after it struck an iceberg?", "choices": ["The Victory", "The Titanic", "The Mayflower", "The Bounty"], "answer": "B"}
{"subject": "history", "question": "In which country did the Industrial Revolution begin?", "choices": ["Russia", "China", "Brazil", "Great Britain"], "answer": "D"}
{"subject": "history", "question": "Who led India's movement for independence by nonviolence?", "choices": ["Mahatma Gandhi", "Mao Zedong", "Nelson Mandela", "Winston Churchill"], "answer": "A"}
)";

inline constexpr std::string_view sample_shots = R"({"subject": "astronomy", "question": "What causes day and night on the Earth?", "choices": ["The tides", "The Moon's orbit", "The Earth's rotation", "Clouds"], "answer": "C"}
{"subject": "astronomy", "question": "What does a light-year measure?", "choices": ["Brightness", "Distance", "Time", "Mass"], "answer": "B"}
{"subject": "astronomy", "question": "How many planets does the solar system have?", "choices": ["Six", "Twelve", "Five", "Eight"], "answer": "D"}
{"subject": "astronomy", "question": "Which planet is farthest from the Sun?", "choices": ["Neptune", "Mercury", "Earth", "Jupiter"], "answer": "A"}
{"subject": "astronomy", "question": "What happens during a lunar eclipse?", "choices": ["The Moon's shadow falls on Mars", "The Moon leaves its orbit", "The Sun goes out", "The Earth's shadow falls on the Moon"], "answer": "D"}
{"subject": "biology", "question": "Which organ do humans use to breathe?", "choices": ["The spleen", "The pancreas", "The lungs", "The liver"], "answer": "C"}
{"subject": "biology", "question": "What is the largest organ of the human body?", "choices": ["The heart", "The skin", "The tongue", "The eye"], "answer": "B"}
{"subject": "biology", "question": "Which of these animals lays eggs?", "choices": ["The horse", "The cow", "The dog", "The chicken"], "answer": "D"}
{"subject": "biology", "question": "What part of a plant takes up water from the soil?", "choices": ["The roots", "The fruit", "The leaves", "The petals"], "answer": "A"}
{"subject": "biology", "question": "Which part of a cell holds most of its DNA?", "choices": ["The nucleus", "The membrane", "The ribosome", "The cell wall"], "answer": "A"}
{"subject": "chemistry", "question": "What is the chemical symbol of oxygen?", "choices": ["Ox", "O", "Os", "Og"], "answer": "B"}
{"subject": "chemistry", "question": "What is frozen water called?", "choices": ["Ice", "Fog", "Steam", "Dew"], "answer": "A"}
{"subject": "chemistry", "question": "Which metal is liquid at room temperature?", "choices": ["Gold", "Mercury", "Copper", "Iron"], "answer": "B"}
{"subject": "chemistry", "question": "Which of these is a noble gas?", "choices": ["Helium", "Hydrogen", "Oxygen", "Chlorine"], "answer": "A"}
{"subject": "chemistry", "question": "What is the pH of pure water?", "choices": ["14", "1", "7", "3"], "answer": "C"}
{"subject": "geography", "question": "What is the capital of Italy?", "choices": ["Athens", "Milan", "Rome", "Vienna"], "answer": "C"}
{"subject": "geography", "question": "Which country is shaped like a boot?", "choices": ["India", "Egypt", "Norway", "Italy"], "answer": "D"}
{"subject": "geography", "question": "On which continent is China?", "choices": ["Asia", "Africa", "North America", "Europe"], "answer": "A"}
{"subject": "geography", "question": "What is the capital of Germany?", "choices": ["Hamburg", "Zurich", "Berlin", "Munich"], "answer": "C"}
{"subject": "geography", "question": "Which is the smallest continent?", "choices": ["Africa", "Australia", "Asia", "South America"], "answer": "B"}
{"subject": "history", "question": "In which year did the First World War begin?", "choices": ["1914", "1989", "1815", "1939"], "answer": "A"}
{"subject": "history", "question": "Which empire did Augustus rule?", "choices": ["The Ottoman Empire", "The Roman Empire", "The British Empire", "The Inca Empire"], "answer": "B"}
{"subject": "history", "question": "Who was Napoleon Bonaparte?", "choices": ["A Greek philosopher", "A king of England", "An emperor of France", "A pope"], "answer": "C"}
{"subject": "history", "question": "Which country gave the Statue of Liberty to the United States?", "choices": ["Spain", "Japan", "Germany", "France"], "answer": "D"}
{"subject": "history", "question": "What was the Magna Carta?", "choices": ["A sailing ship", "A cathedral", "A war", "A charter of rights"], "answer": "D"}
)";

}  // namespace qdylora::examples
