"use strict"  // each slider shows one version of its samples; without this script all are there
document.documentElement.classList.add("live")
for (const player of document.querySelectorAll(".player")) {
  const slider = player.querySelector("input"), stops = player.querySelectorAll(".stops li")
  const samples = [...player.querySelectorAll(".versions")].map(versions => versions.children)
  const cursors = player.closest(".first")?.querySelectorAll(".cursor") || []
  const show = () => {
    const at = Number(slider.value)
    for (const list of [stops, cursors, ...samples])
      [...list].forEach((element, i) => element.classList.toggle("on", i == at))
    slider.setAttribute("aria-valuetext", stops[at].textContent)
  }
  slider.addEventListener("input", show)
  show()
}
document.addEventListener("keydown", event => {  // the arrow keys move the first slider, wherever the reader is
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], slider = document.querySelector(".player input")
  if (!step || event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return
  slider.value = Number(slider.value) + step
  slider.dispatchEvent(new Event("input"))
})
