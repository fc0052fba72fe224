/**
 * Records the page as a visitor would use it: `make recording`. A text comes, a fork is opened, another word is taken, and
 * the text goes on from there. The real server, the real model; Pillow makes one animated picture of it.
 */

import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { closePage, launch, openPage, ROOT } from '../tests/web/browser.mjs'
import { PYTHON, startServer } from '../tests/web/server.mjs'

const FILE = process.argv[2] ?? `${ROOT}docs/images/recording.webp`
const STORY = { prompt: 'Once upon a time in a distant galaxy', max_tokens: 36, threshold: 0.07 }
const ASSEMBLE = `import json, sys
from pathlib import Path
from PIL import Image
folder = Path(sys.argv[1])
frames = json.loads((folder / "frames.json").read_text())
first, *rest = [Image.open(folder / name).convert("RGB") for name, _ in frames]
first.save(sys.argv[2], save_all=True, append_images=rest, duration=[ms for _, ms in frames], loop=0, quality=72, method=5)`

const folder = mkdtempSync(`${tmpdir()}/tempo-recording-`)
const frames = []
const server = await startServer('--model-alias', 'smollm2-135m')
const browser = await launch()
const page = await openPage(browser, `${server.url}/#${new URLSearchParams(STORY)}`, {
  viewport: { width: 1160, height: 720 },
})
const idle = page.locator('button.primary:enabled', { hasText: 'Generate' })

/** One frame, shown for so many milliseconds. */
async function frame(milliseconds) {
  const name = `${String(frames.length).padStart(3, '0')}.png`
  await page.screenshot({ path: `${folder}/${name}` })
  frames.push([name, milliseconds])
}

/** Frames while the text grows. */
async function watch() {
  for (const end = Date.now() + 120_000; Date.now() < end;) {
    await page.waitForTimeout(550)
    await frame(170)
    if (await idle.isVisible()) return
  }
}

/** The pointer goes there and presses; screenshots do not show the system's own. */
async function press(place, hold) {
  const box = await place.boundingBox()
  await page.evaluate(([x, y]) => {
    const dot = document.getElementById('pointer') ?? document.body.appendChild(document.createElement('div'))
    dot.id = 'pointer'
    dot.popover = 'manual' // above the card of a fork
    dot.hidePopover()
    dot.showPopover()
    const style = { position: 'fixed', inset: 'auto', left: `${x}px`, top: `${y}px`, width: '18px', height: '18px', margin: '0',
      padding: '0', border: '2px solid #fff', borderRadius: '50%', background: '#ad3f17cc', pointerEvents: 'none' } // prettier-ignore
    Object.assign(dot.style, style)
  }, [box.x + Math.min(box.width / 2, 60), box.y + box.height / 2]) // prettier-ignore
  await frame(hold)
  await place.click()
  await page.waitForTimeout(250)
}

await idle.waitFor()
await frame(900)
await press(page.getByRole('button', { name: 'Generate', exact: true }), 600)
await watch()
await frame(1200)
const forks = page.locator('.text.body .fork')
await press(forks.nth(Math.min(2, (await forks.count()) - 1)), 700)
await frame(1600)
await press(page.locator('.fork-card .main').nth(1), 900)
await watch()
await frame(3000)
await closePage(page)
await browser.close()
await server.stop()

writeFileSync(`${folder}/frames.json`, JSON.stringify(frames))
execFileSync(PYTHON, ['-c', ASSEMBLE, folder, FILE], { stdio: 'inherit' })
rmSync(folder, { recursive: true })
console.log(`${FILE}: ${frames.length} frames`)
