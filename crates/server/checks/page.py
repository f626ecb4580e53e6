"""The page in headless Chromium: a question is typed, the answer streams, the picture of the cache moves.
Arguments: URL, file for a screenshot."""
import sys
import time

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

options = webdriver.ChromeOptions()
for argument in ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"]:
    options.add_argument(argument)
browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


def until(what, condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            raise SystemExit(f"{what}: not after {seconds} s")
        time.sleep(0.05)


def text(id):
    return browser.find_element(By.ID, id).text


try:
    browser.get(sys.argv[1] + "/")
    until("the model's name", lambda: text("model") == "smollm2-135m")
    held = []
    # The same answer each time, long enough to be seen growing.
    browser.execute_script("document.getElementById('temperature').value = 0")
    browser.find_element(By.ID, "tokens").clear()
    browser.find_element(By.ID, "tokens").send_keys("160")
    browser.find_element(By.ID, "question").send_keys("Tell me how rivers shape the land." + Keys.ENTER)
    lengths = []

    def streamed():
        held.append(text("ours"))
        answers = browser.find_elements(By.CSS_SELECTOR, ".turn.assistant")
        if answers:
            lengths.append(len(answers[0].text))
        return len(set(lengths)) > 3

    until("a streamed answer", streamed)
    until("figures of the answer", lambda: " of " in text("context") and "tokens/s" in text("speed"))
    assert not browser.find_elements(By.CSS_SELECTOR, ".turn.error")
    assert browser.find_elements(By.CSS_SELECTOR, "#blocks i"), "blocks are drawn"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    browser.find_element(By.ID, "question").send_keys("And why do they bend?" + Keys.ENTER)
    until("a second answer", lambda: len(browser.find_elements(By.CSS_SELECTOR, ".turn.assistant")) == 2
          and len(browser.find_elements(By.CSS_SELECTOR, ".turn.assistant")[1].text) > 40)
    # A short answer may end between two looks; what two of them hold differs.
    until("a picture that moved", lambda: held.append(text("ours")) or len({h for h in held if h != "–"}) > 1)
    browser.save_screenshot(sys.argv[2])
    print("the page streams and draws:", text("ours"), "held,", text("half"), "as fp16,", text("times"))
finally:
    browser.quit()
