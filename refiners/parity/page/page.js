(() => {
  const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const filter = document.getElementById("filter");
  const cases = $(".case");
  const hidden = new Set();

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const one of cases) {
      const told = one.dataset.words;
      one.hidden = hidden.has(one.dataset.kind) || !words.every((word) => told.includes(word));
      count += !one.hidden;
    }
    for (const family of $(".family")) family.hidden = !$(".case", family).some((one) => !one.hidden);
    document.getElementById("shown").textContent = `${count} of ${cases.length} cases`;
    document.getElementById("nothing").hidden = count > 0 || !cases.length;
  }

  filter.addEventListener("input", show);
  for (const toggle of $(".toggle"))
    toggle.addEventListener("click", () => {
      const shown = toggle.getAttribute("aria-pressed") === "true";
      toggle.setAttribute("aria-pressed", String(!shown));
      hidden[shown ? "add" : "delete"](toggle.dataset.kind);
      show();
    });
  document.getElementById("clear").addEventListener("click", () => {
    filter.value = "";
    hidden.clear();
    for (const toggle of $(".toggle")) toggle.setAttribute("aria-pressed", "true");
    show();
    filter.focus();
  });

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "Escape" && event.target === filter) {
      filter.value = "";
      show();
    }
  });

  function visit() {
    const one = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!one || !one.matches(".case")) return;
    if (one.hidden) document.getElementById("clear").click();
    one.open = true;
    one.scrollIntoView();
    one.querySelector("summary").focus({ preventScroll: true });
  }
  addEventListener("hashchange", visit);
  visit();

  const leave = (button, told) => {
    const before = button.textContent;
    button.textContent = told;
    setTimeout(() => (button.textContent = before), 1500);
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (!button) return;
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      leave(button, "Copied");
    } catch {
      getSelection().selectAllChildren(code);
      leave(button, "Selected");
    }
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = $(".case.different:not([open])").filter((one) => !one.hidden);
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
})();
