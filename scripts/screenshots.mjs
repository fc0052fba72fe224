/** Takes the README's pictures of the web page: `make screenshots`. The real server, the real model. */

import { mkdirSync } from 'node:fs'
import { launch, openPage, closePage, ROOT } from '../tests/web/browser.mjs'
import { startServer } from '../tests/web/server.mjs'

const FOLDER = process.argv[2] ?? `${ROOT}docs/images`
const STORY = {
  prompt: 'Once upon a time in a distant galaxy',
  max_tokens: 40,
  threshold: 0.07,
  pruning_signal: 'posterior',
  seed: 42,
}

const server = await startServer('--model-alias', 'smollm2-135m')
const browser = await launch()
mkdirSync(FOLDER, { recursive: true })

const open = (settings, options) =>
  openPage(browser, `${server.url}/#${new URLSearchParams(settings)}`, { deviceScaleFactor: 1.25, ...options })

async function generate(page) {
  await page.getByRole('button', { name: 'Generate', exact: true }).click()
  await page.getByRole('button', { name: /^Undo: |^Export/ }).first().waitFor()
  await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
}

async function shoot(page, name) {
  await page.mouse.move(0, 0)
  await page.waitForTimeout(400)
  await page.screenshot({ path: `${FOLDER}/${name}.png` })
  await closePage(page)
}

const run = await open(STORY, { viewport: { width: 1440, height: 900 } })
await generate(run)
await run.getByRole('application').focus()
await run.keyboard.press('Home')
await run.keyboard.press('Escape')
await run.evaluate(() => document.activeElement.blur())
await shoot(run, 'web-run')

const member = await open(STORY, { viewport: { width: 1440, height: 900 }, colorScheme: 'dark' })
await generate(member)
await member.getByRole('radio', { name: 'Sets' }).click()
await member.locator('.set .t').nth(5).click()
await member.getByText('What it would say next').waitFor()
await shoot(member, 'web-member')

const fork = await openPage(browser, server.url, { deviceScaleFactor: 1.25, viewport: { width: 1440, height: 900 } })
await fork.locator('.fork').nth(4).click()
await fork.waitForTimeout(400)
await fork.screenshot({ path: `${FOLDER}/web-fork.png` })
await closePage(fork)

const branches = await open(
  { ...STORY, pruning_signal: '', preset: 'branches', branches: 4 },
  { viewport: { width: 1440, height: 900 } },
)
await generate(branches)
await shoot(branches, 'web-branches')

const phone = await openPage(browser, server.url, { viewport: { width: 380, height: 780 }, deviceScaleFactor: 2 })
await phone.locator('.fork').first().waitFor()
await shoot(phone, 'web-phone')

await browser.close()
await server.stop()
